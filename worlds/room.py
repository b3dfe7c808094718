"""The room: clips of a walk through a hidden room, and their exact measurement.

A square room has four walls of different colours and four fixed places, each of them empty or with a white, a black or
an orange pillar. Somebody walks and turns in it; a clip is `f` frames of 16 x 24 RGB pixels of what they see, shifted
and scaled to unit variance as the latents of a video model are. A model is told the actions, not the room: what it has
not seen yet it must invent, what it has seen it must remember, and the camera must go where the actions say. Everybody
starts in the middle of the room, so where one is follows from the actions alone: a pillar place stops the walker even
when it is empty.

The hidden room is eight whole numbers on a known floor plan: the colours of the walls at +x, +y, -x, -y (six colours),
and what stands on the places (0: nothing). Each column of a frame depends on few of them, known from its pose, so all
92,160 rooms can be compared with a clip exactly. Errors are mean squared differences of latents, whose variance is 1.
In order of trust:

    determined_errors  of the mean that a model predicts at t = 1, given the true past, on the columns that the past
                       determines: where the camera stands still; where it has moved but the last frame shows all that
                       is needed; where memory is needed, because an earlier frame shows it and the last one does not
    memory_error       of generated frames behind given true ones, such as a whole turn, where those determine them
    return_error       between a model's own frames before and after it has looked away and back
    render_error       of a clip to the nearest room along the commanded path (0: one room, seen from the right places)
    validity           of each column to the nearest that any room could show from that pose (0: sharp, in its place)
    variety            how often two clips behind one past disagree on what both reveal, over how often the world's do
                       (1: as varied as the world; 0: always the same). wall_variety and pillar_variety need no second
                       clip: the entropy of the wall colours and of the pillar kinds in the nearest rooms, all clips
                       together, over the world's, log 6 and log 4

`Room.measure` gives those of one clip: render_error, validity, wall_variety, pillar_variety. A label is a row `11 + f`:
start pose, hidden room, actions. Poses `b f 3` are x, y and heading (radians, counter-clockwise from +x); actions and
rooms are int64. Everything but `Room.measure` wants its tensors on the CPU.
"""

import math
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import one_hot

from cameras import row_of
from flowmap import Condition
from worlds.draws import EVALUATE, WORLD, generator
from worlds.toy import enlarged, mean_and_contrast

H, W, RAYS = 16, 24, 3  # rows, columns, rays of a column, which are averaged
HALF, EYE = 3.0, 0.55  # half the width of the room, half its height; the field of view is 90 degrees
RADIUS, BODY = 0.38, 0.35  # of a pillar; how close the walker comes to walls and pillars
STEP, TURN, TURNS = 0.5, math.pi / 6, 12  # of an action; turns in a whole turn
FOG = 0.12  # brightness falls as 1 / (1 + FOG depth)
NORMALS = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])  # directions to the walls
PLACES = 1.3 * torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1]])
WALLS = torch.tensor([[0.95, 0.15, 0.15], [0.15, 0.8, 0.2], [0.2, 0.3, 1], [0.95, 0.85, 0.15], [0.85, 0.2, 0.85],
                      [0.1, 0.8, 0.85]])  # red, green, blue, yellow, magenta, cyan
PILLARS = torch.tensor([[0, 0, 0], [1, 1, 1], [0.08, 0.08, 0.08], [1, 0.5, 0.05]])  # nothing, white, black, orange
EVERY_WALLS = torch.tensor(list(permutations(range(6), 4)))  # (360 4)
EVERY_PLACES = torch.cartesian_prod(*4 * [torch.arange(4)])  # (256 4)
CEILING, FLOOR = (0.72, 0.76, 0.8), (0.42, 0.36, 0.3)
MEAN, STD = 0.448, 0.237  # of the RGB values of this world, in [0, 1]
ACTIONS = ("none", "forward", "back", "left", "right")
NONE, FORWARD, BACK, LEFT, RIGHT = range(5)
OFTEN = torch.tensor([0.08, 0.4, 0.12, 0.2, 0.2])  # how often a random walk takes up each action
KEPT = 0.6  # how often it keeps the last one
PERIOD = 16  # frames from one look around to the next
WHOLE_TURN = " ".join(15 * ["left"])
AWAY_AND_BACK = " ".join(7 * ["left"] + 7 * ["right"] + ["none"])


# ---------------------------------------------------------------------------------------------------------------------
# Paths

def blocked(xy: Tensor) -> Tensor:
    """Whether the walker cannot stand at `... 2`."""
    at_wall = (xy.abs() > HALF - BODY).any(-1)
    return at_wall | ((xy[..., None, :] - PLACES).norm(dim=-1) < RADIUS + BODY).any(-1)


def integrate(start: Tensor, actions: Tensor, detour: Tensor | int = NONE) -> tuple[Tensor, Tensor]:
    """Poses `b f 3` after each of the actions `b f`, from poses `b 3`, and the actions that were done, `b f`.
    detour: an action, or one for each path `b`, that is done in place of a step into a wall or a place.

    A heading is the start's plus a whole number of turns, so looking back shows the very same frame.
    """
    xy, turns, poses, done = start[:, :2], torch.zeros(len(start), dtype=torch.long), [], []
    for action in actions.unbind(1):
        heading = start[:, 2] + TURN * turns
        length = STEP * ((action == FORWARD).float() - (action == BACK).float())
        ahead = xy + length[:, None] * torch.stack([heading.cos(), heading.sin()], -1)
        stopped = blocked(ahead)
        xy, action = torch.where(stopped[:, None], xy, ahead), torch.where(stopped, detour, action)
        turns = (turns + (action == LEFT).long() - (action == RIGHT).long()) % TURNS
        poses.append(torch.cat([xy, start[:, 2:] + TURN * turns[:, None]], 1))
        done.append(action)
    return torch.stack(poses, 1), torch.stack(done, 1)


def label_of(start: Tensor, rooms: Tensor, actions: Tensor, detour: Tensor | int = NONE) -> Tensor:
    """Labels `b 11+f` of start poses `b 3`, rooms `b 8` and actions `b f`: those that integrate says were done."""
    return torch.cat([start, rooms.float(), integrate(start, actions, detour)[1].float()], 1)


def commanded(labels: Tensor, prompt: str) -> Tensor:
    """Labels `b 11+f` of the same starts and rooms, with the actions of a prompt, which follow the first frame.
    ValueError for a word that is no action."""
    words = prompt.lower().split()
    if unknown := [word for word in words if word not in ACTIONS]:
        raise ValueError(f"got the prompt {prompt!r} with {unknown[0]!r}, expected actions of {', '.join(ACTIONS)}, in "
                         'quotes, for example "forward left left": change --prompt')
    actions = torch.tensor([NONE, *(ACTIONS.index(word) for word in words)])
    return label_of(labels[:, :3], labels[:, 3:11], actions.expand(len(labels), -1))


def read(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rooms `b 8`, poses `b f 3` and actions `b f` of labels."""
    rooms, actions = labels[:, 3:11].long(), labels[:, 11:].long()
    return rooms, integrate(labels[:, :3], actions)[0], actions


def camera_of(poses: Tensor) -> tuple[Tensor, Tensor]:
    """World-to-camera matrices `... 4 4` of poses `... 3`, by OpenCV's axes (x right, y down, z forward; in the world z
    is up and the eye is at z = 0), and intrinsics `... 3 3` in units of the image's width and height."""
    x, y, heading = poses.unbind(-1)
    c, s, zero = heading.cos(), heading.sin(), torch.zeros_like(x)
    turn = torch.stack([s, -c, zero, zero, zero, zero - 1, c, s, zero], -1).unflatten(-1, (3, 3))
    view = torch.eye(4).repeat(*x.shape, 1, 1)
    view[..., :3, :3] = turn
    view[..., :3, 3:] = -turn @ torch.stack([x, y, zero], -1)[..., None]
    intrinsics = torch.tensor([[0.5, 0, 0.5], [0, 0.5 * W / H, 0.5], [0, 0, 1]])
    return view, intrinsics.expand(*x.shape, 3, 3)


def rows_of(poses: Tensor, actions: Tensor) -> Tensor:
    """What a network is told of frames, rows `... 23`: the action that led to each `...`, one-hot, and its camera, of
    poses `... 3`, whose unit of length is HALF."""
    camera = row_of(*camera_of(poses / torch.tensor([HALF, HALF, 1])))
    return torch.cat([one_hot(actions, len(ACTIONS)).float(), camera], -1)


def step(pose: Tensor, action: str) -> tuple[Tensor, Tensor]:
    """The pose `3` that an action leads to, and the row `23` of its frame: a walk frame by frame, from heading 0. Its
    poses are those of integrate, bit by bit, however long it is."""
    poses, done = integrate(pose[None], torch.tensor([[ACTIONS.index(action)]]))
    turns = (poses[0, 0, 2:] / TURN).round().long() % TURNS
    pose = torch.cat([poses[0, 0, :2], TURN * turns])
    return pose, rows_of(pose, done[0, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Ray casting

def cast(poses: Tensor) -> tuple[Tensor, Tensor]:
    """Depths along the optical axis at which rays meet the four walls and the four places, infinite where they do not,
    and the brightness of what they meet there, both `... RAYS W 8` of poses `... 3`."""
    u = (torch.arange(RAYS * W) + 0.5) / (RAYS * W) * 2 - 1  # -1 left, 1 right: the tangent of the angle to the axis
    u = rearrange(u, "(w s) -> s w", s=RAYS)
    xy, c, s = poses[..., None, None, :2], *(f(poses[..., 2])[..., None, None] for f in (torch.cos, torch.sin))
    ray = torch.stack([c + u * s, s - u * c], -1)  # of depth 1, (... s w 2)
    approach = ray @ NORMALS.T
    to_wall = (HALF - xy @ NORMALS.T) / approach
    to_wall = torch.where(approach > 0, to_wall, math.inf)
    # a ray meets a circle where square z^2 - 2 along z + distance^2 - RADIUS^2 = 0
    along, square = ray @ PLACES.T - (ray * xy).sum(-1, keepdim=True), ray.square().sum(-1, keepdim=True)
    distance = (PLACES - xy[..., None, :]).norm(dim=-1)
    within = along.square() - square * (distance.square() - RADIUS**2)
    root = within.clamp(min=0).sqrt()
    to_place = torch.where((within > 0) & (along > 0), (along - root) / square, math.inf)
    depth = torch.cat([to_wall, to_place], -1)
    sides = torch.tensor([1, 0.82, 1, 0.82]).expand(to_wall.shape)
    pillars = 0.65 + 0.35 * root / (square.sqrt() * RADIUS)  # by the cosine of the angle to the surface
    return depth, torch.cat([sides, pillars], -1) / (1 + FOG * depth)


def first_hit(depth: Tensor, rooms: Tensor) -> tuple[Tensor, Tensor]:
    """Depth and number (0 to 3 a wall, 4 to 7 a place) of what each ray ends at, `... s w`. depth: `... s w 8`."""
    there = torch.cat([torch.ones_like(rooms[..., :4], dtype=bool), rooms[..., 4:] > 0], -1)
    return torch.where(there[..., None, None, :], depth, math.inf).min(-1)


def paint(depth: Tensor, light: Tensor, rooms: Tensor) -> Tensor:
    """Latents `... 3 H w` from rays `... s w 8` in rooms `... 8`; their leading axes are broadcast."""
    z, hit = first_hit(depth, rooms)  # (... s w)
    light = light.expand(*hit.shape, 8).gather(-1, hit[..., None])[..., 0]
    colours = torch.cat([WALLS[rooms[..., :4]], PILLARS[rooms[..., 4:]]], -2).transpose(-1, -2)  # (... 3 8)
    lead, rays = hit.shape[:-2], hit.shape[-2:]
    hit = hit.flatten(-2)[..., None, :].expand(*lead, 3, -1)
    colour = colours.expand(*lead, 3, 8).gather(-1, hit).unflatten(-1, rays) * light[..., None, :, :]  # (... 3 s w)
    row = torch.arange(H) - (H - 1) / 2  # of its centre, from the horizon; a unit of the image plane is W / 2 rows
    cover = ((W / 2) * EYE / z[..., None, :, :] - row.abs()[:, None, None] + 0.5).clamp(0, 1)  # (... H s w)
    behind = torch.where(row[:, None] < 0, torch.tensor(CEILING), torch.tensor(FLOOR))
    behind = (behind / (1 + FOG * (W / 2) * EYE / row.abs()[:, None])).T[..., None, None]  # (3 H 1 1)
    rgb = behind + cover[..., None, :, :, :] * (colour[..., None, :, :] - behind)
    return (rgb.mean(-2) - MEAN) / STD


def render(rooms: Tensor, poses: Tensor) -> Tensor:
    """Draw rooms `b 8` from poses `b f 3` as latents `b f 3 H W`."""
    return paint(*cast(poses), rooms[:, None])


def shown(rooms: Tensor, poses: Tensor) -> Tensor:
    """Which of the hidden variables each column shows, `b f W 8`: what its rays end at, and the places that they pass,
    which are thereby known to be empty. No other variable could change the column."""
    depth = cast(poses)[0]
    return (depth <= first_hit(depth, rooms[:, None])[0][..., None]).any(-3)


def seen(rooms: Tensor, poses: Tensor) -> Tensor:
    """Which of the hidden variables clips show, `b 8`."""
    return shown(rooms, poses).any(2).any(1)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring memory, where the truth is known

def known(rooms: Tensor, poses: Tensor, given: int | None = None) -> tuple[Tensor, Tensor]:
    """Of every column `b f W`: whether the frames before it determine it (or the first `given` frames do), and whether
    the frame just before it does."""
    needed = shown(rooms, poses)
    in_frame = needed.any(2)  # (b f 8)
    nothing = torch.zeros_like(in_frame[:, :1])
    last = torch.cat([nothing, in_frame[:, :-1]], 1)
    before = last.cumsum(1) > 0 if given is None else in_frame[:, :given].any(1, keepdim=True)
    return tuple(~(needed & ~of[:, :, None]).any(-1) for of in (before, last))


def determined_errors(mean: Tensor, rooms: Tensor, poses: Tensor) -> dict[str, float]:
    """Errors of predictions `b f 3 H W`, each made from the true frames before it, on columns that these determine:
    `still`, `moved` and `memory`, as in this file's docstring. nan where there is no such column."""
    error = (mean - render(rooms, poses)).square().mean((2, 3))
    determined, by_last = known(rooms, poses)
    stands = torch.zeros_like(determined)
    stands[:, 1:] = (poses[:, 1:] == poses[:, :-1]).all(-1)[..., None]
    where = {"still": by_last & stands, "moved": by_last & ~stands, "memory": determined & ~by_last}
    return {name: error[columns].mean().item() for name, columns in where.items()}


def memory_error(x: Tensor, rooms: Tensor, poses: Tensor, given: int) -> float:
    """Error of clips `b f 3 H W`, whose first `given` frames are true, on the later columns that these determine."""
    error = (x - render(rooms, poses)).square().mean((2, 3))[:, given:]
    return error[known(rooms, poses, given)[0][:, given:]].mean().item()


def return_error(x: Tensor, away: int = 7) -> float:
    """Error between frames on the way there and on the way back, of clips with so many turns away and back."""
    return (x[:, :away] - x[:, away + 1 : 2 * away + 1].flip(1)).square().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# The nearest room

def alike(values: Tensor, variables: list[bool]) -> tuple[Tensor, Tensor]:
    """The different rows of values `n 4` in these variables, with 0 for the others, and which of them each row is."""
    return (values * torch.tensor(variables)).unique(dim=0, return_inverse=True)


def products(walls: Tensor, places: Tensor) -> Tensor:
    """Rooms `n*m 8` of all pairs of walls `n 4` and fillings of the places `m 4`, places running faster."""
    return torch.cat([walls.repeat_interleave(len(places), 0), places.repeat(len(walls), 1)], 1)


def column_errors(x: Tensor, poses: Tensor, walls: Tensor, places: Tensor):
    """Errors of all columns of clips `b f 3 H W` to all that rooms could show there. Yields eight times whether some
    columns depend on a variable, these columns `m`, numbered through b, f and W, and their errors to all rooms that
    differ in these variables, `m n`."""
    depth, light = cast(poses)
    could_show = (depth <= depth[..., :4].amin(-1, keepdim=True)).any(-3)  # up to the wall, as in an empty room
    kinds, kind = could_show.flatten(0, 2).unique(dim=0, return_inverse=True)
    x = rearrange(x, "b f c h w -> (b f w) 1 c h 1")
    depth, light = (rearrange(of, "b f s w v -> (b f w) 1 s 1 v") for of in (depth, light))
    for k, variables in enumerate(kinds.tolist()):
        rooms = products(alike(walls, variables[:4])[0], alike(places, variables[4:])[0])
        for some in (kind == k).nonzero()[:, 0].split(1 + 2**14 // len(rooms)):
            yield variables, some, (paint(depth[some], light[some], rooms) - x[some]).square().mean((2, 3, 4))


@torch.no_grad()
def nearest_rooms(x: Tensor, poses: Tensor, walls: Tensor = EVERY_WALLS, places: Tensor = EVERY_PLACES):
    """The room nearest to each clip `b f 3 H W` along poses `b f 3`, rooms `b 8`, and of every column the error to the
    nearest that any room could show there, `b f W`. Variables that nobody could see from there are the first possible.

    Exact: the error of a room is a sum over columns, each a table over its few variables. Tables of the same walls are
    added up over all 256 fillings of the places first, then all tables over all rooms. walls, places: those to choose
    from.
    """
    if len(x) > 64:  # 92,160 numbers a clip
        parts = [nearest_rooms(*of, walls, places) for of in zip(x.split(64), poses.split(64))]
        return tuple(torch.cat(of) for of in zip(*parts))
    b, f = x.shape[:2]
    best, tables, by_walls = torch.empty(b * f * W), {}, {}
    for variables, columns, errors in column_errors(x, poses, walls, places):
        best[columns] = errors.min(1).values
        table = tables.setdefault(tuple(variables), torch.zeros(b, errors.shape[1]))
        table.index_add_(0, columns // (f * W), errors)
    for variables, table in tables.items():
        fillings, filling = alike(places, variables[4:])
        table = table.unflatten(1, (-1, len(fillings)))[:, :, filling]  # (b n 256)
        by_walls[variables[:4]] = by_walls.get(variables[:4], 0) + table
    total = sum(table[:, alike(walls, variables)[1]] for variables, table in by_walls.items())  # (b 360 256)
    return products(walls, places)[total.flatten(1).argmin(1)], best.reshape(b, f, W)


def variety(rooms: Tensor, poses: Tensor, given: int) -> float:
    """How often two clips behind one past disagree on a variable that both reveal, over how often the world's would.

    rooms: the nearest rooms of several clips for each past, `n b 8`, n > 1, whose first `given` frames are the past;
    poses: `b f 3`. In the world, two futures agree on a place with probability 1/4, and on a wall with 1 / (6 - number
    of walls that the past shows).
    """
    before, after = (torch.stack([seen(of, poses[:, :f]) for of in rooms]) for f in (given, poses.shape[1]))
    i, j = torch.combinations(torch.arange(len(rooms))).T
    both, disagree = (after & ~before)[i] & (after & ~before)[j], rooms[i] != rooms[j]
    walls = 1 - 1 / (6 - before[i, :, :4].sum(-1, keepdim=True))
    world = torch.cat([walls.expand(-1, -1, 4), torch.full_like(walls, 3 / 4).expand(-1, -1, 4)], -1)
    return (disagree[both].sum() / world[both].sum()).item()


def entropy(values: Tensor, n: int) -> float:
    """Entropy of the frequencies of the whole numbers 0 ... n - 1, over log n."""
    p = torch.bincount(values, minlength=n) / max(1, len(values))
    return torch.special.entr(p).sum().item() / math.log(n)


# ---------------------------------------------------------------------------------------------------------------------
# The world

def drawn(u: Tensor, frames: int) -> Tensor:
    """Labels of clips as the world draws them, from numbers `b n` in [0, 1), n = numbers(frames).

    Everybody starts in the middle and looks at the wall at +x. Half of the clips look around in every PERIOD of frames,
    after 0 to 5 frames of it, and walk at random in the rest: half of these turn a whole turn, half some turns away and
    as many back. The other half of the clips only walks at random. A walker turns where a wall or a place would stop
    it.
    """
    walls, places, u = u.split([6, 4, u.shape[1] - 10], 1)
    rooms = torch.cat([walls.argsort(1)[:, :4], (4 * places).long()], 1)
    first, looks, whole, side = (6 * u[:, :1]).long(), u[:, 1:2] < 0.5, u[:, 2:3] < 0.5, u[:, 3:4] < 0.5
    away, (keeps, takes) = 3 + (5 * u[:, 4:5]).long(), u[:, 5:].unflatten(1, (frames, 2)).unbind(2)
    taken = torch.where(keeps < KEPT, 0, torch.arange(frames)).cummax(1).values  # the frame whose draw is still kept
    walk = torch.bucketize(takes.gather(1, taken), OFTEN.cumsum(0)[:-1], right=True)
    i = (torch.arange(frames) - first) % PERIOD
    there = torch.where(side, LEFT, RIGHT)
    looking = torch.where(whole | (i <= away), there, LEFT + RIGHT - there)
    actions = torch.where(looks & (i <= torch.where(whole, TURNS, 2 * away)), looking, walk)
    actions[looks & (i == 0)] = NONE
    actions[:, 0] = NONE  # the start is the first frame's pose
    return label_of(torch.zeros(len(u), 3), rooms, actions, there[:, 0])


def numbers(frames: int) -> int:
    """How many random numbers make a clip."""
    return 10 + 5 + 2 * frames


@lru_cache(maxsize=4)
def true_light(frames: int) -> tuple[float, float]:
    """Mean and contrast of the world, what those of generated clips are compared with."""
    return mean_and_contrast(Room().clips(range(1024), frames, WORLD)[0])


class Room:
    """The room as the rest of the project sees it. There are no words: the text is one token of zeros."""

    latent_shape = (3, H, W)  # c h w
    text_shape = (1, 4)  # l d
    prompts = (WHOLE_TURN, AWAY_AND_BACK)  # of 16 frames

    def clips(self, indices, frames: int, *key: int) -> tuple[Tensor, Tensor]:
        """Random clips number `indices` of stream `key`: x `b frames 3 H W`, labels `b 11+frames`."""
        u = torch.stack([torch.rand(numbers(frames), generator=generator(*key, i)) for i in indices])
        labels = drawn(u, frames)
        return render(*read(labels)[:2]), labels

    def draw_labels(self, n: int, frames: int, g: torch.Generator) -> Tensor:
        """Labels `n 11+frames` of clips that are still to be made. Their hidden rooms are told to nobody."""
        return drawn(torch.rand(n, numbers(frames), generator=g), frames)

    def embed(self, labels) -> Condition:
        """Words `b 1 4`, all zero, and a row for each frame, `b f 23` (rows_of)."""
        labels = torch.stack(list(labels))
        _, poses, actions = read(labels)
        return Condition(torch.zeros(len(labels), *self.text_shape), rows_of(poses, actions))

    def parse(self, prompt: str) -> Tensor:
        """The label `11+f` of a walk that starts in the middle of a room, by its actions, "forward left left"."""
        return commanded(torch.tensor([[0.0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0]]), prompt)[0]

    @torch.no_grad()
    def measure(self, x: Tensor, labels: Tensor) -> dict:
        """The metrics of one clip in this file's docstring, floats, and `render_error_by_frame`, a list of f.

        x: generated clips `b f 3 H W`; labels `b 11+f`. Raises ValueError on clips that are not finite.
        """
        if not x.isfinite().all():
            raise ValueError("got non-finite pixels in generated clips, expected finite ones: the model has diverged; "
                             "train it with a smaller learning rate")
        x, (_, poses, _) = x.float().cpu(), read(labels.cpu())
        rooms, best = nearest_rooms(x, poses)
        by_frame = (x - render(rooms, poses)).square().mean((0, 2, 3, 4))
        walls, places = rooms.where(seen(rooms, poses), -1).split(4, 1)  # -1: nobody knows
        return {
            "render_error": by_frame.mean().item(),
            "validity": best.mean().item(),
            "wall_variety": entropy(walls[walls >= 0], 6),
            "pillar_variety": entropy(places[places >= 0], 4),
            "render_error_by_frame": by_frame.tolist(),
            **self.light(x),
        }

    @torch.no_grad()
    def ask(self, n: int, frames: int, chunk: int, make, jump, seed: int) -> dict:
        """What clips of random walks do not tell: memory_error, return_error, variety, and of a causal model
        determined_errors, on n clips.

        make(labels, noise_number, given) -> clips `n f 3 H W` that begin with given frames (or None); jump(labels,
        real) -> each frame in one jump from noise, behind its true past, or None. seed: of the rooms. A number is nan
        where nothing is to be known, in clips of few frames.
        """
        labels = self.draw_labels(n, frames, generator(EVALUATE, seed, 5))

        def along(actions, num_given, *noise_numbers):
            path = commanded(labels, " ".join(actions))
            rooms, poses, _ = read(path)
            given = render(rooms, poses)[:, :num_given] if num_given else None
            return rooms, poses, [make(path, i, given).float().cpu() for i in noise_numbers]

        away = (frames - 2) // 2
        there_and_back = away * ["left"] + away * ["right"] + (frames - 1 - 2 * away) * ["none"]
        _, _, (back,) = along(there_and_back, 0, 0)
        around, whole = (frames - 1) * ["left"], min(TURNS, frames - chunk) // chunk * chunk
        rooms, poses, (turned,) = along(around, whole, 1)
        asked = {"return_error": return_error(back, away), "memory_error": memory_error(turned, rooms, poses, whole)}
        rooms, poses, two = along(around, chunk, 2, 3)
        asked["variety"] = variety(torch.stack([nearest_rooms(x, poses)[0] for x in two]), poses, chunk)
        if jump:
            rooms, poses, _ = read(labels)
            asked |= determined_errors(jump(labels, render(rooms, poses)).float().cpu(), rooms, poses)
        return asked

    def columns(self, r: dict) -> dict[str, str]:
        """A row of the table as it is printed, header -> text. Raises KeyError, TypeError, ... if it lacks something.
        """
        asked = {"still": "still", "moved": "moved", "memory": "memory", "turn": "memory_error",
                 "return": "return_error", "variety": "variety"}
        own = {"error": f"{r['render_error']:7.4f}", "validity": f"{r['validity']:8.4f}",
               "walls": f"{r['wall_variety']:5.2f}", "pillars": f"{r['pillar_variety']:7.2f}",
               "contrast": f"{r['contrast']:8.3f}"}
        return own | {head: f"{r[name]:7.4f}" if name in r else f"{'-':>7}" for head, name in asked.items()}

    def light(self, x: Tensor) -> dict:
        """Of generated clips `b f 3 H W`: mean minus the true world's, contrast over it (worlds/toy.py)."""
        (mean, contrast), (true_mean, true_contrast) = mean_and_contrast(x.float()), true_light(x.shape[1])
        return {"brightness": mean - true_mean, "contrast": contrast / true_contrast}

    def draw(self, x: Tensor, scale: int = 5) -> np.ndarray:
        """Latents `... 3 h w` to bytes `... h w 3`, enlarged."""
        return enlarged(x * STD + MEAN, scale)

    def from_rgb(self, rgb: Tensor) -> Tensor:
        """RGB in [0, 1] to latents."""
        return (rgb - MEAN) / STD
