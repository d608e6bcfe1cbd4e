"""The ray tracer's structs and kernels (see `common.libero.raytracer`): one pixel is one thread of `trace`."""

from __future__ import annotations

from typing import Any

import warp as wp

wp.set_module_options({"enable_backward": False, "fast_math": True})

UNIT = 1000.0  # meshes are kept in millimetres: Warp widens their boxes by 0.001
FAR = 1.0e6
TILE = 16  # pixels
MAX_LEVELS = 13  # mipmap levels of a texture: 4096 pixels and down
MAX_LAYERS = 4  # transparent surfaces seen through each other


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
def trace(
    scene: Scene,
    frame: Frame,
    first: int,
    last: int,
    run: int,
    picture: wp.array(dtype=wp.uint8, ndim=2),
    background: wp.array(dtype=wp.vec4, ndim=2),
):
    """Fill picture (B * C * H * W, 3), row 0 at the top, or background (C, H * W) where picture is empty: `run` pixels a thread, from
    `first` to `last`.

    They are counted row by row, each row of all states in turn: these look at the same parts of the same meshes, which stay in the cache.
    """
    states = frame.camera_position.shape[0]
    begin = first + wp.tid() * run
    for i in range(begin, wp.min(begin + run, last)):
        x = i % scene.width
        state = i // scene.width % states
        y = i // scene.width // states % scene.height
        camera = i // scene.width // states // scene.height
        pixel = y * scene.width + x
        tile = y // TILE * ((scene.width + TILE - 1) // TILE) + x // TILE
        behind = wp.vec4(0.0, 0.0, 0.0, FAR)
        fixed = picture.shape[0] > 0 and scene.cameras[camera].fixed == 1
        if fixed:
            behind = scene.background[camera, pixel]

        colour = wp.vec3(0.0, 0.0, 0.0)
        distance = wp.float32(FAR)
        origin = frame.camera_position[state, camera]
        direction = toward(scene, frame, state, camera, float(x) + 0.5, float(y) + 0.5)
        start = scene.near * wp.length(direction)  # the near plane along this ray
        direction = wp.normalize(direction)
        through = wp.float32(1.0)  # a bare number would be a constant to Warp
        for _ in range(MAX_LAYERS):
            hit = nearest_hit(scene, frame, state, camera, tile, origin, direction, start, behind[3])
            if hit.geom < 0:
                far = wp.vec3(behind[0], behind[1], behind[2])
                if scene.sky >= 0 and not fixed:
                    up = wp.vec3(direction[0], direction[2], -direction[1])
                    far = cube(scene.textures, scene.sky, up, scene.cameras[camera].pixel)
                colour += through * far
                break
            alpha = scene.geoms[hit.geom].rgba[3]
            colour += through * alpha * shade(scene, frame, state, camera, origin, direction, hit)
            through *= 1.0 - alpha
            start = hit.distance + 1.0e-4
            distance = wp.min(distance, hit.distance)
            if through < 0.005:
                break
        if picture.shape[0] > 0:
            at = (state * scene.cameras.shape[0] + camera) * scene.width * scene.height + pixel
            for k in range(3):
                picture[at, k] = wp.uint8(wp.clamp(colour[k] * 255.0 + 0.5, 0.0, 255.0))
        else:
            background[camera, pixel] = wp.vec4(colour[0], colour[1], colour[2], distance)
