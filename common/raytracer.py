"""A ray tracer for MuJoCo scenes in one Warp kernel: pictures without OpenGL, on a CPU or a CUDA device.

It computes what MuJoCo's own renderer computes (fixed-function OpenGL: Gouraud-style diffuse and specular light, a headlight,
spot lights, 2-D and cube textures, trilinear mipmaps, back faces culled) for every pixel on its own, without shadows, reflections, fog
or skins. Every geom becomes a triangle mesh. `common.render` is the interface; this module imports Warp, so it is imported late.
"""

from __future__ import annotations

import mujoco
import numpy as np
import warp as wp
from PIL import Image

wp.set_module_options({"enable_backward": False, "fast_math": True})

NO_TEXTURE, UV, PLANAR, CUBE = 0, 1, 2, 3  # how a geom's texture coordinates come about
MAX_LEVELS = 12  # mipmap levels of a texture, 2048 pixels and down
MAX_LAYERS = 4  # transparent surfaces seen through each other


@wp.struct
class Scene:
    """What does not change from one state to the next. G geoms, L lights, C cameras, T textures, F faces."""

    mesh: wp.array(dtype=wp.uint64)  # (G,)
    face_start: wp.array(dtype=int)  # (G,) first row of the geom's mesh in the three arrays of corners and faces
    corner_normal: wp.array(dtype=wp.vec3, ndim=2)  # (F, 3)
    corner_uv: wp.array(dtype=wp.vec2, ndim=2)  # (F, 3)
    face_density: wp.array(dtype=float)  # (F,) texture widths a metre
    rgba: wp.array(dtype=wp.vec4)  # (G,)
    gloss: wp.array(dtype=wp.vec3)  # (G,) emission, specular, shininess exponent
    mapping: wp.array(dtype=int)  # (G,) NO_TEXTURE, UV, PLANAR or CUBE
    texture: wp.array(dtype=int)  # (G,)
    texture_scale: wp.array(dtype=wp.vec3)  # (G,) from the geom's coordinates to texture coordinates
    texture_level: wp.array(dtype=wp.vec3i, ndim=2)  # (T, MAX_LEVELS) first byte, width, height
    texture_levels: wp.array(dtype=int)  # (T,)
    texture_faces: wp.array(dtype=int)  # (T,) images in a level: 1, or 6 of a cube
    texels: wp.array(dtype=wp.uint8)
    sky: int  # the sky's texture, or -1: black
    ambient: wp.vec3  # of all lights together
    light_position: wp.array(dtype=wp.vec3)  # (L,)
    light_direction: wp.array(dtype=wp.vec3)  # (L,)
    light_diffuse: wp.array(dtype=wp.vec3)  # (L,)
    light_specular: wp.array(dtype=wp.vec3)  # (L,)
    light_attenuation: wp.array(dtype=wp.vec3)  # (L,)
    light_spot: wp.array(dtype=wp.vec2)  # (L,) cosine of the cone's half angle (-2: a directional light), exponent
    headlight: int  # this light looks along the camera, or -1
    pixel: wp.array(dtype=float)  # (C,) a pixel's size at distance 1
    near: float
    width: int
    height: int


@wp.struct
class Frame:
    """Poses of B states. `order` lists the geoms in view of a camera, nearest first; `nearest` their least distances."""

    geom_position: wp.array(dtype=wp.vec3, ndim=2)  # (B, G)
    geom_rotation: wp.array(dtype=wp.mat33, ndim=2)  # (B, G)
    camera_position: wp.array(dtype=wp.vec3, ndim=2)  # (B, C)
    camera_rotation: wp.array(dtype=wp.mat33, ndim=2)  # (B, C)
    centre: wp.array(dtype=wp.vec3, ndim=2)  # (B, G) of the bounding sphere
    radius: wp.array(dtype=float)  # (G,)
    order: wp.array(dtype=int, ndim=3)  # (B, C, G)
    nearest: wp.array(dtype=float, ndim=3)  # (B, C, G), in the order of `order`
    count: wp.array(dtype=int, ndim=2)  # (B, C)


@wp.func
def texel(scene: Scene, start: int, width: int, x: int, y: int):
    i = start + 3 * (y * width + x)
    return wp.vec3(float(scene.texels[i]), float(scene.texels[i + 1]), float(scene.texels[i + 2]))


@wp.func
def bilinear(scene: Scene, texture: int, level: int, face: int, u: float, v: float):
    """The colour (0..255) at (u, v) of one mipmap level; 2-D textures repeat, a cube's faces end at their edges."""
    shape = scene.texture_level[texture, level]
    width = shape[1]
    height = shape[2]
    cube = scene.mapping.shape[0] < 0
    x = u * float(width) - 0.5
    y = v * float(height) - 0.5
    x0 = int(wp.floor(x))
    y0 = int(wp.floor(y))
    fx = x - float(x0)
    fy = y - float(y0)
    x1 = x0 + 1
    y1 = y0 + 1
    if face >= 0:
        x0 = wp.clamp(x0, 0, width - 1)
        x1 = wp.clamp(x1, 0, width - 1)
        y0 = wp.clamp(y0, 0, height - 1)
        y1 = wp.clamp(y1, 0, height - 1)
    else:
        x0 = (x0 % width + width) % width
        x1 = (x1 % width + width) % width
        y0 = (y0 % height + height) % height
        y1 = (y1 % height + height) % height
    start = shape[0]
    if face > 0 and scene.texture_faces[texture] > 1:
        start += 3 * face * width * height
    top = texel(scene, start, width, x0, y0) * (1.0 - fx) + texel(scene, start, width, x1, y0) * fx
    bottom = texel(scene, start, width, x0, y1) * (1.0 - fx) + texel(scene, start, width, x1, y1) * fx
    return top * (1.0 - fy) + bottom * fy
