"""A ray tracer for MuJoCo scenes in one Warp kernel: pictures without OpenGL.

It computes what MuJoCo's own renderer computes (fixed-function OpenGL: diffuse and specular light, a headlight, spot lights, 2-D and
cube textures, trilinear mipmaps, back faces culled), for every pixel on its own and without shadows, reflections, fog and skins.
Every geom becomes a triangle mesh (`triangles.py`); the kernel is in `raytracer_kernels.py`.
The interface is `common.libero.renderers`. This module imports Warp, so it is imported late.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np
import warp as wp
from PIL import Image

from common.cli import usable_cores
from common.libero.raytracer_kernels import MAX_LEVELS, TILE, UNIT, Camera, Face, Frame, Geom, Light, Scene, arrange, place, trace
from common.libero.triangles import areas, texture_coordinates, triangles

SRGB = np.linspace(0, 1, 256)
SRGB_TO_LINEAR = np.round(255 * np.where(SRGB <= 0.04045, SRGB / 12.92, ((SRGB + 0.055) / 1.055) ** 2.4)).astype(np.uint8)


def morton_order(points: np.ndarray) -> np.ndarray:
    """Indices (N,) that put points (N, 3) along a Z-order curve: what is near in space is near in memory, and in a processor's cache."""
    low, size = points.min(0), np.maximum(np.ptp(points, axis=0).max(), 1e-9)
    cells = ((points - low) / size * 1023).astype(np.int64)
    code = np.zeros(len(points), np.int64)
    for bit in range(10):
        for axis in range(3):
            code |= (cells[:, axis] >> bit & 1) << (3 * bit + axis)
    return np.argsort(code, kind="stable")


def unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ones of rows (N, D), in the order in which they first come, and which of them each one is, (N,)."""
    _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return rows[np.sort(first)], np.argsort(np.argsort(first))[which.ravel()]


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
                points, normals, uvs = triangles(model, geom)
                coordinates = texture_coordinates(model, geom, texture, points, uvs)
                rotation = np.eye(3)
                if is_mesh:  # the file's frame, not that of inertia: things are rather aligned with it, and boxes fit better
                    mujoco.mju_quat2Mat(flat := np.zeros(9), model.mesh_quat[geom.dataid // 2])
                    rotation = flat.reshape(3, 3).T
                    points, normals = points @ rotation, normals @ rotation
                order = morton_order(points.mean(1))
                points, normals, coordinates = points[order], normals[order], coordinates[order]
                low, high = points.min((0, 1)), points.max((0, 1))
                shared, corner = unique_rows((UNIT * points.reshape(-1, 3)).astype(np.float32))
                mesh = wp.Mesh(self._array(shared, wp.vec3), self._array(corner, int))
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
        density = np.sqrt(areas(coordinates) / np.maximum(areas(points), 1e-12))
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
        run = 16 if self.device == "cpu" else 1  # a CPU copies the scene's and the frame's structs for each thread

        def launch(start: int) -> None:
            last = min(start + piece, pixels)
            inputs = [self.scene, frame, start, last, run, picture, self.scene.background]
            wp.launch(trace, -(-(last - start) // run), inputs=inputs, device=self.device)

        pieces = range(0, pixels, piece)
        list(self.pool.map(launch, pieces) if self.pool else map(launch, pieces))
