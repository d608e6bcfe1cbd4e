"""A ray tracer for MuJoCo scenes in one Warp kernel: pictures without OpenGL.

It computes what MuJoCo's own renderer computes (fixed-function OpenGL: diffuse and specular light, a headlight, spot lights, 2-D and
cube textures, trilinear mipmaps, back faces culled), for every pixel on its own and without shadows, reflections, fog and skins.
Every geom becomes a triangle mesh. `common.libero.render` is the interface; this module imports Warp, so it is imported late.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mujoco
import numpy as np
import warp as wp
from PIL import Image

from common.cli import usable_cores

wp.set_module_options({"enable_backward": False, "fast_math": True})

UNIT = 1000.0  # meshes are kept in millimetres: Warp widens their boxes by 0.001
FAR = 1.0e6
REVOLVED = mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_ELLIPSOID, mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_CYLINDER
TILE = 16  # pixels
MAX_LEVELS = 13  # mipmap levels of a texture: 4096 pixels and down
MAX_LAYERS = 4  # transparent surfaces seen through each other
SRGB = np.linspace(0, 1, 256)
SRGB_TO_LINEAR = np.round(255 * np.where(SRGB <= 0.04045, SRGB / 12.92, ((SRGB + 0.055) / 1.055) ** 2.4)).astype(np.uint8)


@wp.struct
class Geom:
    """What is drawn of one geom: a mesh, turned so that its box fits well."""

    id: int  # its number in the model
    turn: wp.mat33d  # from the mesh's frame to the geom's
    centre: wp.vec3d  # of the mesh's box
    half: wp.vec3d  # half the box's sides
    mesh: wp.uint64
    first_face: int  # where the mesh's faces begin in `Scene.faces`
    rgba: wp.vec4
    gloss: wp.vec3  # emission, specular, shininess exponent
    texture: int  # or -1


@wp.struct
class Face:
    """A triangle; in the columns of its matrices stand its corners."""

    normals: wp.mat33
    coordinates: wp.mat33  # of the texture: (u, v, 0), or a direction in a cube
    density: float  # change of the coordinates a metre


@wp.struct
class Light:
    position: wp.vec3
    direction: wp.vec3
    diffuse: wp.vec3
    specular: wp.vec3
    attenuation: wp.vec3
    spot: wp.vec2  # cosine of the cone's half angle, exponent; (-2, 0): a directional light


@wp.struct
class Camera:
    id: int  # its number in the model
    pixel: float  # a pixel's size at distance 1
    fixed: int  # 1 if it has a background


@wp.struct
class Textures:
    """T textures with their mipmaps."""

    levels: wp.array(dtype=wp.vec3i, ndim=2)  # (T, MAX_LEVELS) mipmaps: first texel, width, height
    last_level: wp.array(dtype=int)  # (T,)
    cube_faces: wp.array(dtype=int)  # (T,) images in a cube: 6, or 1 for all sides; 0: a 2-D texture
    texels: wp.array(dtype=wp.uint32)  # red, green and blue from the lowest byte up


@wp.struct
class Scene:
    """What is the same in every state. Few arrays, since on a CPU Warp copies this for every pixel, 56 bytes an array."""

    geoms: wp.array(dtype=Geom)  # (G,)
    faces: wp.array(dtype=Face)  # (F,) of all meshes
    lights: wp.array(dtype=Light)  # (L,)
    cameras: wp.array(dtype=Camera)  # (C,)
    drawn: wp.array(dtype=int, ndim=2)  # (C, G) 0: part of the camera's background
    background: wp.array(dtype=wp.vec4, ndim=2)  # (C, H * W) colour and distance of what never moves before a fixed camera
    textures: Textures
    sky: int  # the texture around the scene, or -1: black
    ambient: wp.vec3  # of all lights together
    headlight: int  # the light that looks along the camera, or -1
    near: float
    width: int
    height: int


@wp.struct
class Frame:
    """B states, filled by `place` and `arrange`. `order` lists the geoms that a tile of a picture may show, nearest first."""

    geom_position: wp.array(dtype=wp.vec3, ndim=2)  # (B, G)
    geom_rotation: wp.array(dtype=wp.mat33, ndim=2)  # (B, G)
    camera_position: wp.array(dtype=wp.vec3, ndim=2)  # (B, C)
    camera_rotation: wp.array(dtype=wp.mat33, ndim=2)  # (B, C)
    nearest: wp.array(dtype=float, ndim=3)  # (B, C, G) how near they can be, FAR if not drawn
    sphere: wp.array(dtype=wp.vec4, ndim=3)  # (B, C, G) around them: c = centre - camera, and c.c - radius^2
    order: wp.array(dtype=int, ndim=4)  # (B, C, tiles, G) the first `count` of each row
    count: wp.array(dtype=int, ndim=3)  # (B, C, tiles)


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
    geom = scene.geoms[k]
    rotation = wp.mat33d(geom_rotation[state, geom.id]) * geom.turn
    position = wp.vec3d(geom_position[state, geom.id])
    frame.geom_rotation[state, k] = wp.mat33(rotation)
    frame.geom_position[state, k] = wp.vec3(position)
    radius = wp.length(geom.half)
    for c in range(scene.cameras.shape[0]):
        eye = wp.vec3d(camera_position[state, scene.cameras[c].id])
        view = wp.mat33d(camera_rotation[state, scene.cameras[c].id])
        if k == 0:
            frame.camera_position[state, c] = wp.vec3(eye)
            frame.camera_rotation[state, c] = wp.mat33(view)
        # the distance from the camera to the mesh's box, and the sphere around it
        from_camera = position + rotation * geom.centre - eye
        inside = wp.transpose(rotation) * from_camera
        outside = wp.vec3d()
        for i in range(3):
            outside[i] = wp.max(wp.abs(inside[i]) - geom.half[i], real(0.0))
        frame.nearest[state, c, k] = wp.where(scene.drawn[c, k] == 1, float(wp.length(outside)), FAR)
        beside = float(wp.dot(from_camera, from_camera) - radius * radius)
        frame.sphere[state, c, k] = wp.vec4(float(from_camera[0]), float(from_camera[1]), float(from_camera[2]), beside)


for _vector, _matrix in ((wp.vec3, wp.mat33), (wp.vec3d, wp.mat33d)):  # all at once, or a new one would compile the module again
    wp.overload(place, [Scene, *(wp.array2d(dtype=x) for x in (_vector, _matrix, _vector, _matrix)), Frame])


@wp.func
def toward(scene: Scene, frame: Frame, state: int, camera: int, x: float, y: float):
    """The direction through a point of the picture, in pixels from its upper left corner; its length is the distance at depth 1."""
    size = scene.cameras[camera].pixel
    across = (x - 0.5 * float(scene.width)) * size
    up = (0.5 * float(scene.height) - y) * size
    return frame.camera_rotation[state, camera] * wp.vec3(across, up, -1.0)


@wp.kernel
def arrange(scene: Scene, frame: Frame):
    """For each tile of a camera's picture, the meshes whose spheres reach into the cone around its rays, nearest first."""
    state, camera, tile = wp.tid()
    tiles_across = (scene.width + TILE - 1) // TILE
    left = float(tile % tiles_across * TILE)
    top = float(tile // tiles_across * TILE)
    axis = wp.normalize(toward(scene, frame, state, camera, left + 0.5 * float(TILE), top + 0.5 * float(TILE)))
    cosine = wp.float32(1.0)  # of the cone's half angle
    for i in range(4):
        corner = toward(scene, frame, state, camera, left + float(i % 2 * TILE), top + float(i // 2 * TILE))
        cosine = wp.min(cosine, wp.dot(axis, wp.normalize(corner)))
    sine = wp.sqrt(wp.max(1.0 - cosine * cosine, 0.0))

    count = int(0)  # noqa: UP018 (a variable to Warp, not a constant)
    for k in range(frame.nearest.shape[2]):
        distance = frame.nearest[state, camera, k]
        sphere = frame.sphere[state, camera, k]
        centre = wp.vec3(sphere[0], sphere[1], sphere[2])
        radius = wp.sqrt(wp.max(wp.dot(centre, centre) - sphere[3], 0.0)) + 1.0e-4
        along = wp.dot(centre, axis)
        from_axis = wp.length(centre - along * axis)
        if distance < FAR and along > -radius and from_axis * cosine - along * sine < radius:
            at = int(count)
            while at > 0:
                before = frame.order[state, camera, tile, at - 1]
                if frame.nearest[state, camera, before] <= distance:
                    break
                frame.order[state, camera, tile, at] = before
                at -= 1
            frame.order[state, camera, tile, at] = k
            count += 1
    frame.count[state, camera, tile] = count


@wp.func
def unpacked(texel: wp.uint32):
    byte = wp.uint32(255)
    return wp.vec3(float(texel & byte), float((texel >> wp.uint32(8)) & byte), float((texel >> wp.uint32(16)) & byte))


@wp.func
def bilinear(textures: Textures, texture: int, level: int, face: int, u: float, v: float):
    """The colour (0..255) at (u, v) of one mipmap level. A 2-D texture (face -1) repeats, a cube's faces stop at their edges."""
    shape = textures.levels[texture, level]
    width = shape[1]
    height = shape[2]
    start = shape[0] + width * height * wp.max(0, wp.min(face, textures.cube_faces[texture] - 1))
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
    above = unpacked(textures.texels[start + y0 * width + x0]) * (1.0 - fx) + unpacked(textures.texels[start + y0 * width + x1]) * fx
    below = unpacked(textures.texels[start + y1 * width + x0]) * (1.0 - fx) + unpacked(textures.texels[start + y1 * width + x1]) * fx
    return above * (1.0 - fy) + below * fy


@wp.func
def trilinear(textures: Textures, texture: int, face: int, u: float, v: float, footprint: float):
    """The colour (0..1) of a texture where a pixel covers `footprint` of its width."""
    widths = footprint * float(textures.levels[texture, 0][1])
    level = wp.clamp(wp.log2(wp.max(widths, 1.0)), 0.0, float(textures.last_level[texture]))
    fine = int(level)
    colour = bilinear(textures, texture, fine, face, u, v)
    between = level - float(fine)
    if between > 0.0:
        colour = colour * (1.0 - between) + bilinear(textures, texture, fine + 1, face, u, v) * between
    return colour / 255.0


@wp.func
def cube(textures: Textures, texture: int, d: wp.vec3, footprint: float):
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
    return trilinear(textures, texture, face, s * inverse + 0.5, t * inverse + 0.5, footprint * inverse)


@wp.func
def nearest_hit(
    scene: Scene, frame: Frame, state: int, camera: int, tile: int, origin: wp.vec3, direction: wp.vec3, start: float, end: float
):
    """The first front face along a ray between two distances."""
    hit = Hit()
    hit.geom = -1
    hit.distance = end
    for k in range(frame.count[state, camera, tile]):
        geom = frame.order[state, camera, tile, k]
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
            query = wp.mesh_query_ray(scene.geoms[geom].mesh, begin, local_direction, UNIT * (hit.distance - skip))
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
    geom = scene.geoms[hit.geom]
    face = scene.faces[geom.first_face + hit.face]
    corners = wp.vec3(hit.u, hit.v, 1.0 - hit.u - hit.v)
    normal = wp.normalize(frame.geom_rotation[state, hit.geom] * (face.normals * corners))
    point = origin + direction * hit.distance
    base = wp.vec3(geom.rgba[0], geom.rgba[1], geom.rgba[2])
    colour = base * geom.gloss[0] + wp.cw_mul(base, scene.ambient)
    for i in range(scene.lights.shape[0]):
        light = scene.lights[i]
        light_direction = light.direction
        if i == scene.headlight:
            view = frame.camera_rotation[state, camera]
            light_direction = wp.vec3(-view[0, 2], -view[1, 2], -view[2, 2])
        to_light = -light_direction
        strength = wp.float32(1.0)
        if light.spot[0] > -2.0:
            to_light = light.position - point
            distance = wp.length(to_light)
            to_light = to_light / distance
            strength = 1.0 / (light.attenuation[0] + distance * (light.attenuation[1] + distance * light.attenuation[2]))
            cosine = -wp.dot(to_light, light_direction)
            strength *= wp.where(cosine < light.spot[0], 0.0, wp.pow(wp.max(cosine, 0.0), light.spot[1]))
        lambert = wp.dot(normal, to_light)
        if lambert > 0.0 and strength > 0.0:
            colour += strength * lambert * wp.cw_mul(base, light.diffuse)
            half_way = wp.dot(normal, wp.normalize(to_light - direction))
            if geom.gloss[1] > 0.0 and half_way > 0.0:
                colour += strength * geom.gloss[1] * wp.pow(half_way, geom.gloss[2]) * light.specular
    colour = wp.vec3(wp.min(colour[0], 1.0), wp.min(colour[1], 1.0), wp.min(colour[2], 1.0))

    if geom.texture >= 0:
        at = face.coordinates * corners
        # a pixel on the surface is stretched along one direction by 1 / cosine: its mean width
        stretched = scene.cameras[camera].pixel * hit.distance / wp.sqrt(wp.max(-wp.dot(normal, direction), 0.05))
        footprint = stretched * face.density
        if scene.textures.cube_faces[geom.texture] == 0:
            colour = wp.cw_mul(colour, trilinear(scene.textures, geom.texture, -1, at[0], at[1], footprint))
        else:
            colour = wp.cw_mul(colour, cube(scene.textures, geom.texture, at, footprint))
    return colour


@wp.kernel
def trace(scene: Scene, frame: Frame, first: int, picture: wp.array(dtype=wp.uint8, ndim=2), background: wp.array(dtype=wp.vec4, ndim=2)):
    """Fill picture (B * C * H * W, 3), row 0 at the top, or background (C, H * W) where picture is empty."""
    i = first + wp.tid()
    cameras = scene.cameras.shape[0]
    pixels = scene.width * scene.height
    state = i // pixels // cameras
    camera = (i // pixels) % cameras
    pixel = i % pixels

    origin = frame.camera_position[state, camera]
    x = pixel % scene.width
    y = pixel // scene.width
    tile = y // TILE * ((scene.width + TILE - 1) // TILE) + x // TILE
    direction = toward(scene, frame, state, camera, float(x) + 0.5, float(y) + 0.5)
    start = scene.near * wp.length(direction)  # the near plane along this ray
    direction = wp.normalize(direction)
    behind = wp.vec4(0.0, 0.0, 0.0, FAR)
    fixed = picture.shape[0] > 0 and scene.cameras[camera].fixed == 1
    if fixed:
        behind = scene.background[camera, pixel]

    colour = wp.vec3(0.0, 0.0, 0.0)
    through = wp.float32(1.0)  # a bare number would be a constant to Warp
    distance = wp.float32(FAR)
    for _ in range(MAX_LAYERS):
        hit = nearest_hit(scene, frame, state, camera, tile, origin, direction, start, behind[3])
        if hit.geom < 0:
            last = wp.vec3(behind[0], behind[1], behind[2])
            if scene.sky >= 0 and not fixed:
                last = cube(scene.textures, scene.sky, wp.vec3(direction[0], direction[2], -direction[1]), scene.cameras[camera].pixel)
            colour += through * last
            break
        alpha = scene.geoms[hit.geom].rgba[3]
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

        self.scene = scene = Scene()
        self._set_geoms(model, geoms)
        self._set_lights(abstract.lights[: abstract.nlight])
        pixel = 2 * np.tan(np.radians(model.cam_fovy[camera_ids]) / 2) / height
        scene.cameras = self._structs(Camera, id=camera_ids, pixel=pixel, fixed=np.zeros(len(camera_ids)))
        scene.near = model.vis.map.znear * model.stat.extent
        scene.width, scene.height = width, height

        # What a fixed camera sees of what never moves is traced once. This also compiles the kernel, which threads must not do at once.
        self.pool, self.threads = None, 1
        scene.background = wp.zeros((len(camera_ids), width * height), dtype=wp.vec4, device=device)
        scene.drawn = self._array(np.broadcast_to(unmoved, (len(camera_ids), len(ids))), int, 2)
        poses = data.geom_xpos, data.geom_xmat.reshape(-1, 3, 3), data.cam_xpos, data.cam_xmat.reshape(-1, 3, 3)
        frame = self._frame(self._poses(*(p[None] for p in poses)))
        self._trace(frame, wp.empty((0, 3), dtype=wp.uint8, device=device))
        scene.cameras = self._structs(Camera, id=camera_ids, pixel=pixel, fixed=fixed)
        scene.drawn = self._array(~(fixed[:, None] & unmoved), int, 2)
        if device == "cpu":
            self.threads = threads or usable_cores()
            self.pool = ThreadPoolExecutor(self.threads)

    def _array(self, values, dtype, ndim: int = 1) -> wp.array:
        values = np.asarray(values)
        if dtype in (int, float):
            values = values.astype(np.int32 if dtype is int else np.float32)
        return wp.array(values, dtype=dtype, ndim=ndim, device=self.device)

    def _structs(self, struct, **fields) -> wp.array:
        """An array of Warp structs from an array or list for each of its fields."""
        rows = np.zeros(len(next(iter(fields.values()))), struct.numpy_dtype())
        for name, values in fields.items() if len(rows) else ():
            rows[name] = values
        return wp.array(rows, dtype=struct, device=self.device)

    def _set_geoms(self, model: mujoco.MjModel, geoms: list) -> None:
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
        self.meshes, first_face, turn, centre, half = zip(*rows, strict=True)  # Warp frees a mesh that Python forgets
        self.scene.geoms = self._structs(
            Geom,
            id=[g.objid for g in geoms],
            turn=turn,
            centre=centre,
            half=half,
            mesh=[m.id for m in self.meshes],
            first_face=first_face,
            rgba=[g.rgba for g in geoms],
            gloss=[(g.emission, g.specular, 128 * g.shininess) for g in geoms],
            texture=textures,
        )
        points, normals, coordinates = (np.concatenate(x) for x in zip(*corners, strict=True))
        density = np.sqrt(_areas(coordinates) / np.maximum(_areas(points), 1e-12))
        columns = dict(normals=normals.swapaxes(1, 2), coordinates=coordinates.swapaxes(1, 2))
        self.scene.faces = self._structs(Face, **columns, density=density)
        self._set_textures(model, {*textures})

    def _set_textures(self, model: mujoco.MjModel, used: set[int]) -> None:
        skies = np.flatnonzero(model.tex_type == mujoco.mjtTexture.mjTEXTURE_SKYBOX)
        self.scene.sky = int(skies[0]) if len(skies) else -1
        levels = np.zeros((max(model.ntex, 1), MAX_LEVELS, 3), np.int32)
        last, faces = np.zeros(len(levels), int), np.zeros(len(levels), int)
        texels, start = [np.zeros(1, np.uint32)], 1
        for i in (used | {self.scene.sky}) - {-1}:
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
                texels += [(np.asarray(image, np.uint32) << [0, 8, 16]).sum(-1, dtype=np.uint32).ravel() for image in images]
                start += sum(image.width * image.height for image in images)
                if max(images[0].size) == 1:
                    break
                images = [image.reduce((min(2, image.width), min(2, image.height))) for image in images]
        textures = self.scene.textures
        textures.levels = self._array(levels, wp.vec3i, 2)
        textures.last_level, textures.cube_faces = self._array(last, int), self._array(faces, int)
        textures.texels = self._array(np.concatenate(texels), wp.uint32)

    def _set_lights(self, lights: list) -> None:
        scene = self.scene
        ambient = np.sum([light.ambient for light in lights], 0) if lights else [0.3, 0.3, 0.3]  # MuJoCo's when there are none
        scene.ambient = wp.vec3(*(float(x) for x in ambient))
        scene.headlight = next((i for i, light in enumerate(lights) if light.headlight), -1)
        directional = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
        scene.lights = self._structs(
            Light,
            position=[x.pos for x in lights],
            direction=[x.dir for x in lights],
            diffuse=[x.diffuse for x in lights],
            specular=[x.specular for x in lights],
            attenuation=[x.attenuation for x in lights],
            spot=[(-2, 0) if x.type == directional else (np.cos(np.radians(x.cutoff)), x.exponent) for x in lights],
        )

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
        frame.nearest, frame.sphere = (wp.empty((states, cameras, geoms), dtype=x, **on) for x in (float, wp.vec4))
        tiles = -(-self.width // TILE) * -(-self.height // TILE)
        frame.order = wp.empty((states, cameras, tiles, geoms), dtype=int, **on)
        frame.count = wp.empty((states, cameras, tiles), dtype=int, **on)
        wp.launch(place, (states, geoms), inputs=[self.scene, *poses, frame], **on)
        wp.launch(arrange, (states, cameras, tiles), inputs=[self.scene, frame], **on)
        return frame

    def _trace(self, frame: Frame, picture: wp.array) -> None:
        """Run the kernel over all pixels; on the CPU in pieces, since Warp itself uses one core."""
        views = frame.camera_position.size
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
