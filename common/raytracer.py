"""A ray tracer for MuJoCo scenes in one Warp kernel: pictures without OpenGL.

It computes what MuJoCo's own renderer computes (fixed-function OpenGL: diffuse and specular light, a headlight, spot lights, 2-D and
cube textures, trilinear mipmaps, back faces culled), for every pixel on its own and without shadows, reflections, fog and skins.
Every geom becomes a triangle mesh. `common.render` is the interface; this module imports Warp, so it is imported late.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mujoco
import numpy as np
import warp as wp
from PIL import Image

wp.set_module_options({"enable_backward": False, "fast_math": True})

UNIT = 1000.0  # meshes are kept in millimetres: Warp widens their boxes by 0.001
FAR = 1.0e6
REVOLVED = mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_ELLIPSOID, mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_CYLINDER
MAX_LEVELS = 13  # mipmap levels of a texture: 4096 pixels and down
MAX_LAYERS = 4  # transparent surfaces seen through each other
SRGB = np.linspace(0, 1, 256)
SRGB_TO_LINEAR = np.round(255 * np.where(SRGB <= 0.04045, SRGB / 12.92, ((SRGB + 0.055) / 1.055) ** 2.4)).astype(np.uint8)


@wp.struct
class Scene:
    """What is the same in every state. G geoms, F faces, T textures, L lights, C cameras."""

    geom: wp.array(dtype=int)  # (G,) their numbers in the model
    turn: wp.array(dtype=wp.mat33d)  # (G,) from the mesh's frame to the geom's
    centre: wp.array(dtype=wp.vec3d)  # (G,) of the mesh's box
    half: wp.array(dtype=wp.vec3d)  # (G,) half the box's sides
    camera: wp.array(dtype=int)  # (C,) their numbers in the model
    tangent: wp.array(dtype=wp.vec2d)  # (C,) of half the field of view, across and up
    drawn: wp.array(dtype=int, ndim=2)  # (C, G) 0: part of the camera's background
    mesh: wp.array(dtype=wp.uint64)  # (G,)
    first_face: wp.array(dtype=int)  # (G,) where the mesh's rows begin in the next three
    normals: wp.array(dtype=wp.vec3, ndim=2)  # (F, 3) at a face's corners
    coordinates: wp.array(dtype=wp.vec3, ndim=2)  # (F, 3) of the texture: (u, v, 0), or a direction in a cube
    density: wp.array(dtype=float)  # (F,) change of the coordinates a metre
    rgba: wp.array(dtype=wp.vec4)  # (G,)
    gloss: wp.array(dtype=wp.vec3)  # (G,) emission, specular, shininess exponent
    texture: wp.array(dtype=int)  # (G,) or -1
    levels: wp.array(dtype=wp.vec3i, ndim=2)  # (T, MAX_LEVELS) mipmaps: first byte, width, height
    last_level: wp.array(dtype=int)  # (T,)
    cube_faces: wp.array(dtype=int)  # (T,) images in a cube: 6, or 1 for all sides; 0: a 2-D texture
    texels: wp.array(dtype=wp.uint8)
    sky: int  # the texture around the scene, or -1: black
    ambient: wp.vec3  # of all lights together
    headlight: int  # the light that looks along the camera, or -1
    light_position: wp.array(dtype=wp.vec3)  # (L,)
    light_direction: wp.array(dtype=wp.vec3)  # (L,)
    light_diffuse: wp.array(dtype=wp.vec3)  # (L,)
    light_specular: wp.array(dtype=wp.vec3)  # (L,)
    light_attenuation: wp.array(dtype=wp.vec3)  # (L,)
    light_spot: wp.array(dtype=wp.vec2)  # (L,) cosine of the cone's half angle, exponent; (-2, 0): a directional light
    pixel: wp.array(dtype=float)  # (C,) a pixel's size at distance 1
    background: wp.array(dtype=wp.vec4, ndim=2)  # (C, H * W) colour and distance of what never moves before a fixed camera
    fixed: wp.array(dtype=int)  # (C,) 1 if the camera has a background
    near: float
    width: int
    height: int


@wp.struct
class Frame:
    """B states, filled by `place` and `arrange`. `order` lists the geoms that a camera may see, nearest first."""

    geom_position: wp.array(dtype=wp.vec3, ndim=2)  # (B, G)
    geom_rotation: wp.array(dtype=wp.mat33, ndim=2)  # (B, G)
    camera_position: wp.array(dtype=wp.vec3, ndim=2)  # (B, C)
    camera_rotation: wp.array(dtype=wp.mat33, ndim=2)  # (B, C)
    order: wp.array(dtype=int, ndim=3)  # (B, C, G) the first `count` of each row
    nearest: wp.array(dtype=float, ndim=3)  # (B, C, G) how near they can be, FAR if out of sight
    sphere: wp.array(dtype=wp.vec4, ndim=3)  # (B, C, G) around them: c = centre - camera, and c.c - radius^2
    count: wp.array(dtype=int, ndim=2)  # (B, C)


@wp.struct
class Hit:
    geom: int  # -1: nothing
    distance: float
    face: int
    u: float
    v: float


real = wp.float64


@wp.kernel
def place(
    scene: Scene,
    geom_position: wp.array2d(dtype=Any),  # (B, ngeom) of the model, as all four in single or in double precision
    geom_rotation: wp.array2d(dtype=Any),
    camera_position: wp.array2d(dtype=Any),  # (B, ncam)
    camera_rotation: wp.array2d(dtype=Any),
    frame: Frame,
):
    """The poses of meshes and cameras, and how each camera stands to each mesh."""
    state, k = wp.tid()
    rotation = wp.mat33d(geom_rotation[state, scene.geom[k]]) * scene.turn[k]
    position = wp.vec3d(geom_position[state, scene.geom[k]])
    frame.geom_rotation[state, k] = wp.mat33(rotation)
    frame.geom_position[state, k] = wp.vec3(position)
    half = scene.half[k]
    radius = wp.length(half)
    for c in range(scene.camera.shape[0]):
        eye = wp.vec3d(camera_position[state, scene.camera[c]])
        view = wp.mat33d(camera_rotation[state, scene.camera[c]])
        if k == 0:
            frame.camera_position[state, c] = wp.vec3(eye)
            frame.camera_rotation[state, c] = wp.mat33(view)
        # the distance from the camera to the mesh's box, and whether its bounding sphere is in the pyramid of view
        from_camera = position + rotation * scene.centre[k] - eye
        inside = wp.transpose(rotation) * from_camera
        outside = wp.vec3d()
        for i in range(3):
            outside[i] = wp.max(wp.abs(inside[i]) - half[i], real(0.0))
        offset = wp.transpose(view) * from_camera  # right, up, back of the camera
        seen = scene.drawn[c, k] == 1 and offset[2] < radius
        for i in range(2):  # the side planes
            tangent = scene.tangent[c][i]
            beyond = (wp.abs(offset[i]) + offset[2] * tangent) / wp.sqrt(real(1.0) + tangent * tangent)
            seen = seen and beyond < radius
        frame.nearest[state, c, k] = wp.where(seen, float(wp.length(outside)), FAR)
        beside = float(wp.dot(from_camera, from_camera) - radius * radius)
        frame.sphere[state, c, k] = wp.vec4(float(from_camera[0]), float(from_camera[1]), float(from_camera[2]), beside)


for _vector, _matrix in ((wp.vec3, wp.mat33), (wp.vec3d, wp.mat33d)):  # all at once, or a new one would compile the module again
    wp.overload(place, [Scene, *(wp.array2d(dtype=x) for x in (_vector, _matrix, _vector, _matrix)), Frame])


@wp.kernel
def arrange(frame: Frame):
    """For each camera the meshes that it may see, nearest first."""
    state, camera = wp.tid()
    count = int(0)  # noqa: UP018 (a variable to Warp, not a constant)
    for k in range(frame.nearest.shape[2]):
        distance = frame.nearest[state, camera, k]
        if distance < FAR:
            at = int(count)
            while at > 0:
                before = frame.order[state, camera, at - 1]
                if frame.nearest[state, camera, before] <= distance:
                    break
                frame.order[state, camera, at] = before
                at -= 1
            frame.order[state, camera, at] = k
            count += 1
    frame.count[state, camera] = count


@wp.func
def texel(scene: Scene, start: int, width: int, x: int, y: int):
    i = start + 3 * (y * width + x)
    return wp.vec3(float(scene.texels[i]), float(scene.texels[i + 1]), float(scene.texels[i + 2]))


@wp.func
def bilinear(scene: Scene, texture: int, level: int, face: int, u: float, v: float):
    """The colour (0..255) at (u, v) of one mipmap level. A 2-D texture (face -1) repeats, a cube's faces stop at their edges."""
    shape = scene.levels[texture, level]
    width = shape[1]
    height = shape[2]
    start = shape[0] + 3 * width * height * wp.max(0, wp.min(face, scene.cube_faces[texture] - 1))
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
    above = texel(scene, start, width, x0, y0) * (1.0 - fx) + texel(scene, start, width, x1, y0) * fx
    below = texel(scene, start, width, x0, y1) * (1.0 - fx) + texel(scene, start, width, x1, y1) * fx
    return above * (1.0 - fy) + below * fy


@wp.func
def trilinear(scene: Scene, texture: int, face: int, u: float, v: float, footprint: float):
    """The colour (0..1) of a texture where a pixel covers `footprint` of its width."""
    widths = footprint * float(scene.levels[texture, 0][1])
    level = wp.clamp(wp.log2(wp.max(widths, 1.0)), 0.0, float(scene.last_level[texture]))
    fine = int(level)
    colour = bilinear(scene, texture, fine, face, u, v)
    between = level - float(fine)
    if between > 0.0:
        colour = colour * (1.0 - between) + bilinear(scene, texture, fine + 1, face, u, v) * between
    return colour / 255.0


@wp.func
def cube(scene: Scene, texture: int, d: wp.vec3, footprint: float):
    """The colour of a cube texture in direction d; faces +X, -X, +Y, -Y, +Z, -Z as OpenGL lays them out."""
    x = wp.abs(d[0])
    y = wp.abs(d[1])
    z = wp.abs(d[2])
    if x >= y and x >= z:
        face = wp.where(d[0] > 0.0, 0, 1)
        s = wp.where(d[0] > 0.0, -d[2], d[2])
        t = -d[1]
    elif y >= z:
        face = wp.where(d[1] > 0.0, 2, 3)
        s = d[0]
        t = wp.where(d[1] > 0.0, d[2], -d[2])
    else:
        face = wp.where(d[2] > 0.0, 4, 5)
        s = wp.where(d[2] > 0.0, d[0], -d[0])
        t = -d[1]
    inverse = 0.5 / wp.max(wp.max(x, wp.max(y, z)), 1.0e-9)
    return trilinear(scene, texture, face, s * inverse + 0.5, t * inverse + 0.5, footprint * inverse)


@wp.func
def nearest_hit(scene: Scene, frame: Frame, state: int, camera: int, origin: wp.vec3, direction: wp.vec3, start: float, end: float):
    """The first front face along a ray between two distances."""
    hit = Hit()
    hit.geom = -1
    hit.distance = end
    for k in range(frame.count[state, camera]):
        geom = frame.order[state, camera, k]
        if frame.nearest[state, camera, geom] > hit.distance:
            break
        sphere = frame.sphere[state, camera, geom]
        along = sphere[0] * direction[0] + sphere[1] * direction[1] + sphere[2] * direction[2]
        if sphere[3] > 0.0 and (along < 0.0 or along * along < sphere[3]):
            continue
        rotation = wp.transpose(frame.geom_rotation[state, geom])
        local_origin = rotation * (origin - frame.geom_position[state, geom])
        local_direction = rotation * direction
        skip = float(start)
        for _ in range(8):  # back faces are culled: go on behind them
            begin = UNIT * (local_origin + local_direction * skip)
            query = wp.mesh_query_ray(scene.mesh[geom], begin, local_direction, UNIT * (hit.distance - skip))
            if not query.result:
                break
            skip += query.t / UNIT
            if query.sign > 0.0:
                hit.geom = geom
                hit.distance = skip
                hit.face = query.face
                hit.u = query.u
                hit.v = query.v
                break
            skip += 1.0e-5
    return hit


@wp.func
def shade(scene: Scene, frame: Frame, state: int, camera: int, origin: wp.vec3, direction: wp.vec3, hit: Hit):
    """OpenGL's lighting equation at a hit, times the texture's colour."""
    geom = hit.geom
    face = scene.first_face[geom] + hit.face
    w = 1.0 - hit.u - hit.v
    normal = scene.normals[face, 0] * hit.u + scene.normals[face, 1] * hit.v + scene.normals[face, 2] * w
    normal = wp.normalize(frame.geom_rotation[state, geom] * normal)
    point = origin + direction * hit.distance
    rgba = scene.rgba[geom]
    base = wp.vec3(rgba[0], rgba[1], rgba[2])
    gloss = scene.gloss[geom]
    colour = base * gloss[0] + wp.cw_mul(base, scene.ambient)
    for i in range(scene.light_position.shape[0]):
        light_direction = scene.light_direction[i]
        if i == scene.headlight:
            view = frame.camera_rotation[state, camera]
            light_direction = wp.vec3(-view[0, 2], -view[1, 2], -view[2, 2])
        to_light = -light_direction
        strength = wp.float32(1.0)
        spot = scene.light_spot[i]
        if spot[0] > -2.0:
            to_light = scene.light_position[i] - point
            distance = wp.length(to_light)
            to_light = to_light / distance
            attenuation = scene.light_attenuation[i]
            strength = 1.0 / (attenuation[0] + distance * (attenuation[1] + distance * attenuation[2]))
            cosine = -wp.dot(to_light, light_direction)
            strength *= wp.where(cosine < spot[0], 0.0, wp.pow(wp.max(cosine, 0.0), spot[1]))
        lambert = wp.dot(normal, to_light)
        if lambert > 0.0 and strength > 0.0:
            colour += strength * lambert * wp.cw_mul(base, scene.light_diffuse[i])
            half_way = wp.dot(normal, wp.normalize(to_light - direction))
            if gloss[1] > 0.0 and half_way > 0.0:
                colour += strength * gloss[1] * wp.pow(half_way, gloss[2]) * scene.light_specular[i]
    colour = wp.vec3(wp.min(colour[0], 1.0), wp.min(colour[1], 1.0), wp.min(colour[2], 1.0))

    texture = scene.texture[geom]
    if texture >= 0:
        at = scene.coordinates[face, 0] * hit.u + scene.coordinates[face, 1] * hit.v + scene.coordinates[face, 2] * w
        # a pixel on the surface is stretched along one direction by 1 / cosine: its mean width
        footprint = scene.pixel[camera] * hit.distance / wp.sqrt(wp.max(-wp.dot(normal, direction), 0.05)) * scene.density[face]
        if scene.cube_faces[texture] == 0:
            colour = wp.cw_mul(colour, trilinear(scene, texture, -1, at[0], at[1], footprint))
        else:
            colour = wp.cw_mul(colour, cube(scene, texture, at, footprint))
    return colour


@wp.func
def ray(scene: Scene, frame: Frame, state: int, camera: int, pixel: int):
    """The direction through a pixel's middle, its length the distance at depth 1."""
    size = scene.pixel[camera]
    x = (float(pixel % scene.width) + 0.5 - 0.5 * float(scene.width)) * size
    y = (0.5 * float(scene.height) - float(pixel // scene.width) - 0.5) * size
    return frame.camera_rotation[state, camera] * wp.vec3(x, y, -1.0)


@wp.kernel
def trace(scene: Scene, frame: Frame, first: int, picture: wp.array(dtype=wp.uint8, ndim=2), background: wp.array(dtype=wp.vec4, ndim=2)):
    """Fill picture (B * C * H * W, 3), row 0 at the top, or background (C, H * W) where picture is empty."""
    i = first + wp.tid()
    cameras = scene.pixel.shape[0]
    pixels = scene.width * scene.height
    state = i // pixels // cameras
    camera = (i // pixels) % cameras
    pixel = i % pixels

    origin = frame.camera_position[state, camera]
    direction = ray(scene, frame, state, camera, pixel)
    start = scene.near * wp.length(direction)  # the near plane along this ray
    direction = wp.normalize(direction)
    behind = wp.vec4(0.0, 0.0, 0.0, FAR)
    fixed = picture.shape[0] > 0 and scene.fixed[camera] == 1
    if fixed:
        behind = scene.background[camera, pixel]

    colour = wp.vec3(0.0, 0.0, 0.0)
    through = wp.float32(1.0)  # a bare number would be a constant to Warp
    distance = wp.float32(FAR)
    for _ in range(MAX_LAYERS):
        hit = nearest_hit(scene, frame, state, camera, origin, direction, start, behind[3])
        if hit.geom < 0:
            last = wp.vec3(behind[0], behind[1], behind[2])
            if scene.sky >= 0 and not fixed:
                last = cube(scene, scene.sky, wp.vec3(direction[0], direction[2], -direction[1]), scene.pixel[camera])
            colour += through * last
            break
        alpha = scene.rgba[hit.geom][3]
        colour += through * alpha * shade(scene, frame, state, camera, origin, direction, hit)
        through *= 1.0 - alpha
        start = hit.distance + 1.0e-4
        distance = wp.min(distance, hit.distance)
        if through < 0.005:
            break
    if picture.shape[0] > 0:
        for k in range(3):
            picture[i, k] = wp.uint8(wp.clamp(colour[k] * 255.0 + 0.5, 0.0, 255.0))
    else:
        background[camera, pixel] = wp.vec4(colour[0], colour[1], colour[2], distance)


class RayTracer:
    """Pictures of a model's states. The model must not change afterwards.

    Lights stay where the model's default pose has them; the headlight follows the camera. Cameras are pinholes given by fovy.
    Args: option (mujoco.MjvOption) says which geoms are visible; camera_ids: C cameras; threads: on the CPU, default the cores that this
    process may use; device: Warp's name of it (not run on CUDA yet).
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        option: mujoco.MjvOption,
        camera_ids: list[int],
        width: int,
        height: int,
        threads: int | None = None,
        device: str = "cpu",
    ):
        self.device = device
        self.width, self.height = width, height

        # MuJoCo itself resolves visibility, materials and lights: an MjvScene needs no OpenGL.
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        abstract = mujoco.MjvScene(model, maxgeom=model.ngeom + 1000)
        mujoco.mjv_updateScene(model, data, option, None, mujoco.MjvCamera(), mujoco.mjtCatBit.mjCAT_ALL, abstract)
        geoms = [g for g in abstract.geoms[: abstract.ngeom] if g.objtype == mujoco.mjtObj.mjOBJ_GEOM and g.rgba[3] > 0.005]
        ids = np.array([g.objid for g in geoms], int)
        opaque = np.array([g.rgba[3] > 0.995 for g in geoms], bool)
        unmoved = opaque & (model.body_weldid[model.geom_bodyid[ids]] == 0)
        fixed = (model.body_weldid[model.cam_bodyid[camera_ids]] == 0) & (model.cam_mode[camera_ids] == 0)
        tangent = np.tan(np.radians(model.cam_fovy[camera_ids]) / 2)  # of half the vertical field of view

        self.scene = scene = Scene()
        self._set_geometry(model, geoms)
        self._set_textures(model)
        self._set_lights(abstract.lights[: abstract.nlight])
        scene.rgba = self._array([g.rgba for g in geoms], wp.vec4)
        scene.gloss = self._array([(g.emission, g.specular, 128 * g.shininess) for g in geoms], wp.vec3)
        scene.pixel = self._array(2 * tangent / height, float)
        scene.geom, scene.camera = self._array(ids, int), self._array(camera_ids, int)
        scene.tangent = self._array(tangent[:, None] * [width / height, 1], wp.vec2d)
        scene.near = model.vis.map.znear * model.stat.extent
        scene.width, scene.height = width, height

        # What a fixed camera sees of what never moves is traced once. This also compiles the kernel, which threads must not do at once.
        self.pool, self.threads = None, 1
        scene.background = wp.zeros((len(camera_ids), width * height), dtype=wp.vec4, device=device)
        scene.drawn = self._array(np.broadcast_to(unmoved, (len(camera_ids), len(ids))), int, 2)
        poses = data.geom_xpos, data.geom_xmat.reshape(-1, 3, 3), data.cam_xpos, data.cam_xmat.reshape(-1, 3, 3)
        frame = self._frame(self._poses(*(p[None] for p in poses)))
        self._trace(frame, wp.empty((0, 3), dtype=wp.uint8, device=device))
        scene.fixed, scene.drawn = self._array(fixed, int), self._array(~(fixed[:, None] & unmoved), int, 2)
        if device == "cpu":
            self.threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
            self.pool = ThreadPoolExecutor(self.threads)

    def _array(self, values, dtype, ndim: int = 1) -> wp.array:
        values = np.asarray(values)
        if dtype in (int, float):
            values = values.astype(np.int32 if dtype is int else np.float32)
        return wp.array(values, dtype=dtype, ndim=ndim, device=self.device)

    def _set_geometry(self, model: mujoco.MjModel, geoms: list) -> None:
        """A mesh for each different geom, turned to boxes that fit: `turn` takes it to the geom's frame."""
        known, corners, rows = {}, [], []
        textures = []
        for geom in geoms:
            texture = model.mat_texid[geom.matid, mujoco.mjtTextureRole.mjTEXROLE_RGB] if geom.matid >= 0 else -1
            textures.append(texture)
            is_mesh = geom.type == mujoco.mjtGeom.mjGEOM_MESH
            key = (geom.dataid if is_mesh else geom.type, *geom.size, *((texture, geom.matid) if texture >= 0 else ()))
            if key not in known:
                points, normals, uvs = _triangles(model, geom)
                coordinates = _texture_coordinates(model, geom, texture, points, uvs)
                rotation = np.eye(3)
                if is_mesh:  # the file's frame, not that of inertia: things are rather aligned with it, and boxes fit better
                    mujoco.mju_quat2Mat(flat := np.zeros(9), model.mesh_quat[geom.dataid // 2])
                    rotation = flat.reshape(3, 3).T
                    points, normals = points @ rotation, normals @ rotation
                low, high = points.min((0, 1)), points.max((0, 1))
                vertices = self._array(UNIT * points.reshape(-1, 3), wp.vec3)
                mesh = wp.Mesh(vertices, self._array(np.arange(3 * len(points)), int))
                known[key] = mesh, sum(len(c[0]) for c in corners), rotation, (low + high) / 2, (high - low) / 2
                corners.append((points, normals, coordinates))
            rows.append(known[key])
        meshes, first_face, rotation, centre, half = zip(*rows, strict=True)
        self.meshes = meshes  # Warp frees a mesh that Python forgets
        self.scene.turn, self.scene.centre = self._array(rotation, wp.mat33d), self._array(centre, wp.vec3d)
        self.scene.half = self._array(half, wp.vec3d)
        points, normals, coordinates = (np.concatenate(x) for x in zip(*corners, strict=True))
        density = np.sqrt(_areas(coordinates) / np.maximum(_areas(points), 1e-12))
        self.scene.mesh = self._array([m.id for m in meshes], wp.uint64)
        self.scene.first_face = self._array(first_face, int)
        self.scene.normals, self.scene.coordinates = self._array(normals, wp.vec3, 2), self._array(coordinates, wp.vec3, 2)
        self.scene.density = self._array(density, float)
        self.scene.texture = self._array(textures, int)

    def _set_textures(self, model: mujoco.MjModel) -> None:
        skies = np.flatnonzero(model.tex_type == mujoco.mjtTexture.mjTEXTURE_SKYBOX)
        self.scene.sky = int(skies[0]) if len(skies) else -1
        levels = np.zeros((max(model.ntex, 1), MAX_LEVELS, 3), np.int32)
        last, faces = np.zeros(len(levels), int), np.zeros(len(levels), int)
        texels, start = [np.zeros(1, np.uint8)], 1
        for i in {*self.scene.texture.numpy(), self.scene.sky} - {-1}:
            width, height, channels = model.tex_width[i], model.tex_height[i], model.tex_nchannel[i]
            pixels = model.tex_data[model.tex_adr[i] :][: width * height * channels].reshape(height, width, channels)
            pixels = np.repeat(pixels, 3, -1) if channels == 1 else pixels[..., :3]
            if model.tex_colorspace[i] == mujoco.mjtColorSpace.mjCOLORSPACE_SRGB:
                pixels = SRGB_TO_LINEAR[pixels]
            if model.tex_type[i] != mujoco.mjtTexture.mjTEXTURE_2D:
                faces[i] = height // width
            images = [Image.fromarray(np.ascontiguousarray(face)) for face in np.split(pixels, max(faces[i], 1))]
            for level in range(MAX_LEVELS):
                levels[i, level], last[i] = (start, *images[0].size), level
                texels += [np.asarray(image).ravel() for image in images]
                start += sum(3 * image.width * image.height for image in images)
                if max(images[0].size) == 1:
                    break
                images = [image.reduce((min(2, image.width), min(2, image.height))) for image in images]
        self.scene.levels = self._array(levels, wp.vec3i, 2)
        self.scene.last_level, self.scene.cube_faces = self._array(last, int), self._array(faces, int)
        self.scene.texels = self._array(np.concatenate(texels), wp.uint8)

    def _set_lights(self, lights: list) -> None:
        scene = self.scene
        ambient = np.sum([light.ambient for light in lights], 0) if lights else [0.3, 0.3, 0.3]  # MuJoCo's when there are none
        scene.ambient = wp.vec3(*(float(x) for x in ambient))
        scene.headlight = next((i for i, light in enumerate(lights) if light.headlight), -1)
        directional = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
        spot = [(-2, 0) if x.type == directional else (np.cos(np.radians(x.cutoff)), x.exponent) for x in lights]
        scene.light_spot = self._array(np.reshape(spot, (-1, 2)), wp.vec2)
        for ours, theirs in (("position", "pos"), ("direction", "dir"), *((x, x) for x in ("diffuse", "specular", "attenuation"))):
            values = np.reshape([getattr(light, theirs) for light in lights], (-1, 3))
            setattr(scene, f"light_{ours}", self._array(values, wp.vec3))

    def render(self, geom_position, geom_rotation, camera_position, camera_rotation) -> np.ndarray:
        """Pictures (B, C, H, W, 3) uint8, row 0 at the top, of poses (B, ngeom, 3), (B, ngeom, 3, 3), (B, ncam, 3), (B, ncam, 3, 3)."""
        shape = len(geom_position), *self.scene.background.shape[:1], self.height, self.width, 3
        picture = wp.empty((np.prod(shape[:-1]), 3), dtype=wp.uint8, device=self.device)
        self.draw(picture, *self._poses(geom_position, geom_rotation, camera_position, camera_rotation))
        return picture.numpy().reshape(shape)

    def draw(self, picture: wp.array, geom_position, geom_rotation, camera_position, camera_rotation) -> None:
        """Fill `picture` (B * C * H * W, 3) uint8 from poses that are on the device: (B, ngeom) vec3 and mat33, (B, ncam) likewise."""
        self._trace(self._frame((geom_position, geom_rotation, camera_position, camera_rotation)), picture)

    def _poses(self, *poses: np.ndarray) -> list[wp.array]:
        return [self._array(p, dtype, 2) for p, dtype in zip(poses, (wp.vec3d, wp.mat33d) * 2, strict=True)]

    def _frame(self, poses) -> Frame:
        (states, cameras, geoms), on = (poses[0].shape[0], *self.scene.drawn.shape), {"device": self.device}
        frame = Frame()
        frame.geom_position, frame.geom_rotation = (wp.empty((states, geoms), dtype=x, **on) for x in (wp.vec3, wp.mat33))
        frame.camera_position, frame.camera_rotation = (wp.empty((states, cameras), dtype=x, **on) for x in (wp.vec3, wp.mat33))
        frame.order, frame.nearest, frame.sphere = (wp.empty((states, cameras, geoms), dtype=x, **on) for x in (int, float, wp.vec4))
        frame.count = wp.empty((states, cameras), dtype=int, **on)
        wp.launch(place, (states, geoms), inputs=[self.scene, *poses, frame], **on)
        wp.launch(arrange, (states, cameras), inputs=[frame], **on)
        return frame

    def _trace(self, frame: Frame, picture: wp.array) -> None:
        """Run the kernel over all pixels; on the CPU in pieces, since Warp itself uses one core."""
        views = frame.count.size
        pixels = views * self.width * self.height
        piece = pixels if self.threads == 1 else -(-pixels // max(4 * self.threads, views))

        def launch(start: int) -> None:
            inputs = [self.scene, frame, start, picture, self.scene.background]
            wp.launch(trace, min(piece, pixels - start), inputs=inputs, device=self.device)

        pieces = range(0, pixels, piece)
        list(self.pool.map(launch, pieces) if self.pool else map(launch, pieces))


def _areas(corners: np.ndarray) -> np.ndarray:
    """Twice the areas of triangles (F, 3, 3)."""
    return np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=-1)


def _texture_coordinates(model: mujoco.MjModel, geom, texture: int, points: np.ndarray, uvs: np.ndarray | None) -> np.ndarray:
    """(F, 3, 3) as MuJoCo's OpenGL code generates them from positions, where the mesh has none of its own."""
    coordinates = np.zeros(points.shape)
    if texture < 0:
        return coordinates
    size = np.where(np.asarray(geom.size) > 0, geom.size, 1.0)
    uniform = model.mat_texuniform[geom.matid]
    if uvs is not None:
        coordinates[..., :2] = uvs
    elif model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_2D:  # along x and y; repeats count by size or by metre
        repeat = 0.5 * model.mat_texrepeat[geom.matid] / (1 if uniform else size[:2])
        coordinates[..., :2] = points[..., :2] * repeat * [1, -1] - 0.5
    else:
        coordinates[:] = points if uniform or geom.type == mujoco.mjtGeom.mjGEOM_MESH else points / size
    return coordinates


def _triangles(model: mujoco.MjModel, geom) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A geom's corners (F, 3, 3), their normals (F, 3, 3) and texture coordinates (F, 3, 2) or None, in the geom's frame."""
    kind, size = mujoco.mjtGeom(geom.type), model.geom_size[geom.objid]
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        return _mesh(model, geom.dataid // 2)  # dataid is odd for the convex hull
    if kind == mujoco.mjtGeom.mjGEOM_PLANE:
        x, y = np.where(size[:2] > 0, size[:2], 50.0)  # 0: no end
        points, normals = _quad([x, 0, 0], [0, y, 0], [0, 0, 0])
    elif kind == mujoco.mjtGeom.mjGEOM_BOX:
        axes = np.diag(size)
        sides = [_quad(axes[(i + 1) % 3], sign * axes[(i + 2) % 3], sign * axes[i]) for i in range(3) for sign in (1, -1)]
        points, normals = (np.concatenate(x) for x in zip(*sides, strict=True))
    elif kind in REVOLVED:
        points, normals = _revolved(kind, size)
    else:
        raise NotImplementedError(f"the ray tracer has no triangles for {kind.name}")
    return points, normals, None


def _mesh(model: mujoco.MjModel, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    faces = slice(model.mesh_faceadr[i], model.mesh_faceadr[i] + model.mesh_facenum[i])
    points = model.mesh_vert[model.mesh_vertadr[i] + model.mesh_face[faces]]
    normals = model.mesh_normal[model.mesh_normaladr[i] + model.mesh_facenormal[faces]]
    if model.mesh_texcoordadr[i] >= 0:
        return points, normals, model.mesh_texcoord[model.mesh_texcoordadr[i] + model.mesh_facetexcoord[faces]]
    flat = np.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0])[:, None]
    flat /= np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-20)
    # as MuJoCo does: a normal that is far from its face's gives way to it
    return points, np.where((normals * flat).sum(-1, keepdims=True) < 0.8, flat, normals), None


def _quad(x, y, centre) -> tuple[np.ndarray, np.ndarray]:
    """Two triangles over centre +- x +- y, facing x cross y."""
    x, y, centre = (np.asarray(a, float) for a in (x, y, centre))
    a, b, c, d = centre - x - y, centre + x - y, centre + x + y, centre - x + y
    normal = np.cross(x, y)
    return np.array([[a, b, c], [a, c, d]]), np.broadcast_to(normal / np.linalg.norm(normal), (2, 3, 3))


def _revolved(kind: mujoco.mjtGeom, size: np.ndarray, segments: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A sphere, ellipsoid, capsule or cylinder: a profile of (radius, height), bottom to top, and its normals, turned about z."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, segments // 2 + 1)
    arc = np.stack([np.cos(angle), np.sin(angle)], -1)
    points = normals = arc  # the unit sphere
    if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        points = np.array([[0, -1], [1, -1], [1, -1], [1, 1], [1, 1], [0, 1]]) * size[:2]
        normals = np.array([[0, -1], [0, -1], [1, 0], [1, 0], [0, 1], [0, 1]])
    elif kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
        half = np.arange(segments // 2 + 2) - (np.arange(segments // 2 + 2) > segments // 4)
        normals = arc[half]
        points = normals * size[0] + np.where(np.arange(len(half)) > segments // 4, 1, -1)[:, None] * [0, size[1]]
    turn = np.linspace(0, 2 * np.pi, segments + 1)

    def turned(profile: np.ndarray) -> np.ndarray:
        rings = [profile[:, :1] * np.cos(turn), profile[:, :1] * np.sin(turn), np.broadcast_to(profile[:, 1:], (len(profile), len(turn)))]
        grid = np.stack(rings, -1)
        a, b, c, d = grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]
        return np.stack([a, b, c, a, c, d], 2).reshape(-1, 3, 3)

    points, normals = turned(points), turned(normals)
    if kind in (mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_ELLIPSOID):
        scale = size if kind == mujoco.mjtGeom.mjGEOM_ELLIPSOID else np.full(3, size[0])
        points, normals = points * scale, normals / scale
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    solid = _areas(points) > 1e-14  # no triangles at the poles
    return points[solid], normals[solid]
