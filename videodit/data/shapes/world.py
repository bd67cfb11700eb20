"""The built-in world "shapes": what can be in a clip, where it goes, and the words for it.

World units are pixels of a 64x64 frame: the frame is the square [0, 64] x [0, 64], x to the right, y down. Time is u in
[0, 16], the frame index of a 17-frame clip; a clip of another length samples the same path more finely or more
coarsely, and one of another size scales it, so that a scene fits its frame at every length and resolution.

Each object has a circumradius of 5, 8 or 11 px. Grow and shrink pass linearly from 0.6 to 1.4 of it (or back), so that
the word for the size is the radius in the middle of the clip, which is also the median radius, for every motion.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

WORLD_SIZE = 64.0
DURATION = 16.0  # u of the last frame
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 205, 50),
    "blue": (45, 70, 240),
    "yellow": (230, 210, 35),
    "magenta": (220, 45, 215),
    "cyan": (35, 205, 220),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES: dict[str, float] = {"small": 5.0, "medium": 8.0, "large": 11.0}
MOTIONS = ("left", "right", "up", "down", "diagonal", "orbit", "grow", "shrink", "bounce", "still")
# Gray levels at the top and at the bottom of the frame: achromatic, so that chroma alone tells an object from them.
BACKGROUNDS: dict[str, tuple[int, int]] = {
    "dark": (28, 28),
    "gray": (122, 122),
    "light": (226, 226),
    "gradient": (50, 200),
}

MIN_SPEED, MAX_SPEED = 1.0, 3.0  # px a frame
MIN_RADIUS_FACTOR, MAX_RADIUS_FACTOR = 0.6, 1.4  # grow and shrink
ORBIT_RADII = (6.0, 10.0)
MIN_ORBIT_TURNS = 0.75
BOUNCE_TIMES = (5.0, 11.0)  # the frames between which the border is hit
STAR_INNER_RATIO = 0.45  # inner over outer radius of the five-pointed star

# Each shape's bounding box at circumradius 1 (x0, y0, x1, y1). All are upright, their centre of mass at the origin.
EXTENTS: dict[str, tuple[float, float, float, float]] = {
    "circle": (-1.0, -1.0, 1.0, 1.0),
    "square": (-math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(0.5), math.sqrt(0.5)),
    "triangle": (-math.sqrt(0.75), -1.0, math.sqrt(0.75), 0.5),
    "star": (-math.sin(0.4 * math.pi), -1.0, math.sin(0.4 * math.pi), math.cos(0.2 * math.pi)),
}

# motion -> the exact phrase and two paraphrases
MOTION_PHRASES: dict[str, tuple[str, str, str]] = {
    "left": ("moves left", "travels to the left", "slides toward the left side"),
    "right": ("moves right", "travels to the right", "slides toward the right side"),
    "up": ("moves up", "rises upward", "climbs toward the top"),
    "down": ("moves down", "falls downward", "sinks toward the bottom"),
    "diagonal": ("moves diagonally", "travels along a diagonal", "slides at an angle toward a corner"),
    "orbit": ("orbits in a circle", "circles around a point", "goes round and round"),
    "grow": ("grows", "gets bigger", "expands in place"),
    "shrink": ("shrinks", "gets smaller", "contracts in place"),
    "bounce": ("bounces up and down", "hits the border and bounces back", "rebounds from the top or bottom edge"),
    "still": ("stays still", "does not move", "remains in place"),
}
# One sentence for the exact caption and one for each paraphrase.
SENTENCES = (
    "{scene} over a {background} background",
    "{scene} in front of a {background} background",
    "on a {background} background, {scene}",
)


@dataclass(frozen=True)
class ObjectSpec:
    """One object: its four attributes, and the path that realises them, in world units.

    Attributes:
        x: centre at u = 0.
        y: centre at u = 0.
        speed: px a frame along the path; 0 where the object stays in place.
        heading: direction of travel at u = 0, radians from +x towards +y (down).
        turn_radius: radius of the orbit, positive when clockwise on the screen; 0 for straight paths.
    """

    color: str
    shape: str
    size: str
    motion: str
    x: float
    y: float
    speed: float = 0.0
    heading: float = 0.0
    turn_radius: float = 0.0

    def centers(self, u: np.ndarray) -> np.ndarray:
        """Centre at each time.

        Args:
            u: (t,) times in [0, 16].
        Returns:
            (t, 2) x and y in world units.
        """
        travel = self.speed * u
        if self.motion == "orbit":
            # The circle's centre lies at a right angle to the heading: at +90 degrees if clockwise, as y points down.
            angle = self.heading + travel / self.turn_radius
            return np.stack(
                [
                    self.x + self.turn_radius * (np.sin(angle) - math.sin(self.heading)),
                    self.y - self.turn_radius * (np.cos(angle) - math.cos(self.heading)),
                ],
                axis=1,
            )
        x = self.x + travel * math.cos(self.heading)
        y = self.y + travel * math.sin(self.heading)
        if self.motion == "bounce":
            _, low, _, high = self._room()
            room = high - low
            y = low + np.abs((y - low + room) % (2 * room) - room)  # a triangle wave between the borders
        return np.stack([x, y], axis=1)

    def radii(self, u: np.ndarray) -> np.ndarray:
        """(t,) circumradius in world units at times u (t,)."""
        change = {"grow": 1.0, "shrink": -1.0}.get(self.motion, 0.0) * (MAX_RADIUS_FACTOR - MIN_RADIUS_FACTOR) / 2
        return SIZES[self.size] * (1.0 + change * (2.0 * u / DURATION - 1.0))

    def _room(self) -> tuple[float, float, float, float]:
        """Where the centre may be (x0, y0, x1, y1) for the object to stay wholly in the frame."""
        radius = SIZES[self.size] * (MAX_RADIUS_FACTOR if self.motion in ("grow", "shrink") else 1.0)
        x0, y0, x1, y1 = (radius * extent for extent in EXTENTS[self.shape])
        return -x0, -y0, WORLD_SIZE - x1, WORLD_SIZE - y1


@dataclass(frozen=True)
class SceneSpec:
    """A scene that renders to one clip; later objects are drawn over earlier ones.

    Attributes:
        objects: one or more objects.
        background: a key of BACKGROUNDS.
        seed: tells apart scenes that are otherwise equal, for generation; rendering does not depend on it.
    """

    objects: tuple[ObjectSpec, ...]
    background: str
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that from_dict reads back exactly."""
        return {"objects": [asdict(obj) for obj in self.objects], "background": self.background, "seed": self.seed}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SceneSpec":
        """The inverse of to_dict.

        Raises:
            TypeError: if an object has unknown or missing fields.
            KeyError: if a field of the scene is missing.
        """
        return cls(tuple(ObjectSpec(**obj) for obj in data["objects"]), data["background"], data["seed"])


def frame_times(num_frames: int) -> np.ndarray:
    """(num_frames,) times u in [0, 16], evenly spaced from the first frame to the last."""
    return np.linspace(0.0, DURATION, num_frames)


def is_held_out(color: str, shape: str, motion: str) -> bool:
    """Whether a triple is held out of training: (c + 2 s + 3 m) mod 8 = 0, the places in COLORS, SHAPES and MOTIONS."""
    return (list(COLORS).index(color) + 2 * SHAPES.index(shape) + 3 * MOTIONS.index(motion)) % 8 == 0


def split_triples(split: Split) -> list[tuple[str, str, str]]:
    """All (color, shape, motion) of a split: 240 in both together.

    Raises:
        ValueError: if the split is neither train nor held_out.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: choose 'train' or 'held_out'")
    triples = [(c, s, m) for c in COLORS for s in SHAPES for m in MOTIONS]
    return [triple for triple in triples if is_held_out(*triple) == (split == "held_out")]


def captions(spec: SceneSpec) -> list[str]:
    """The exact caption and two paraphrases; each names all attributes of every object, and the background."""
    return [
        sentence.format(
            scene=" and ".join(f"a {o.size} {o.color} {o.shape} {MOTION_PHRASES[o.motion][i]}" for o in spec.objects),
            background=spec.background,
        )
        for i, sentence in enumerate(SENTENCES)
    ]


def place_object(rng: np.random.Generator, color: str, shape: str, size: str, motion: str) -> ObjectSpec:
    """Draws a path for an object with the given attributes, uniformly among those that stay wholly in the frame."""
    quarter = math.pi / 2
    speed, heading, turn_radius = 0.0, 0.0, 0.0
    dx = dy = 0.0  # displacement over the clip
    x0, y0, x1, y1 = ObjectSpec(color, shape, size, motion, 0.0, 0.0)._room()
    if motion in ("left", "right", "up", "down", "diagonal"):
        headings = {"right": 0.0, "down": quarter, "left": 2 * quarter, "up": 3 * quarter}
        heading = headings[motion] if motion in headings else quarter * (0.5 + int(rng.integers(4)))
        cos, sin = math.cos(heading), math.sin(heading)
        longest = min((x1 - x0) / max(abs(cos), 1e-9), (y1 - y0) / max(abs(sin), 1e-9))
        speed = rng.uniform(MIN_SPEED, min(MAX_SPEED, longest / DURATION))
        dx, dy = speed * DURATION * cos, speed * DURATION * sin
    elif motion == "orbit":
        turn_radius = rng.uniform(*ORBIT_RADII) * (1 if rng.integers(2) else -1)
        slowest = MIN_ORBIT_TURNS * 2 * math.pi * abs(turn_radius) / DURATION
        speed = rng.uniform(max(MIN_SPEED, slowest), MAX_SPEED)
        heading = rng.uniform(0.0, 2 * math.pi)
    elif motion == "bounce":
        speed = rng.uniform(MIN_SPEED, MAX_SPEED)
        heading = quarter if rng.integers(2) else 3 * quarter
        distance = speed * rng.uniform(*BOUNCE_TIMES)  # to the border that is hit
        y0 = y1 = y1 - distance if heading == quarter else y0 + distance
    if motion == "orbit":  # the centre of the circle keeps a radius from every border; the start follows from it
        r = abs(turn_radius)
        x = rng.uniform(x0 + r, x1 - r) + turn_radius * math.sin(heading)
        y = rng.uniform(y0 + r, y1 - r) - turn_radius * math.cos(heading)
    else:
        x = rng.uniform(x0 - min(dx, 0.0), x1 - max(dx, 0.0))
        y = rng.uniform(y0 - min(dy, 0.0), y1 - max(dy, 0.0))
    return ObjectSpec(color, shape, size, motion, float(x), float(y), float(speed), float(heading), float(turn_radius))


def sample_spec(rng: np.random.Generator, split: Split = "train", num_objects: int = 1) -> SceneSpec:
    """Draws a scene; with several objects, their colors differ and they never touch.

    Args:
        rng: the only source of randomness.
        split: "train" draws only triples that are not held out, "held_out" only held-out ones, uniformly.
        num_objects: 1 or 2.
    Raises:
        ValueError: if num_objects or split is out of range.
    """
    if num_objects not in (1, 2):
        raise ValueError(f"num_objects is {num_objects}: choose 1 or 2")
    triples = split_triples(split)
    background = str(rng.choice(list(BACKGROUNDS)))
    seed = int(rng.integers(2**31))
    while True:  # a pair that leaves no room for each other is drawn anew; at random, many do not fit
        chosen = [triples[int(rng.integers(len(triples)))] for _ in range(num_objects)]
        objects = tuple(place_object(rng, c, s, str(rng.choice(list(SIZES))), m) for c, s, m in chosen)
        if num_objects == 1 or (objects[0].color != objects[1].color and _apart(objects[0], objects[1])):
            return SceneSpec(objects, background, seed)


def _apart(a: ObjectSpec, b: ObjectSpec, gap: float = 2.0) -> bool:
    """Whether two objects keep a gap between their circumcircles at every moment."""
    u = frame_times(33)
    distance = np.hypot(*(a.centers(u) - b.centers(u)).T)
    return bool(np.all(distance >= a.radii(u) + b.radii(u) + gap))


def prompt_specs(n: int, split: Split = "train", seed: int = 0) -> list[SceneSpec]:
    """Scenes to evaluate prompt following with, balanced over motion, color, shape, size and background.

    Motions are dealt in turn; each takes the least used triple that balances colors and shapes best, ties broken by
    the seed.

    Args:
        n: how many; the list for a smaller n is a prefix of the list for a larger one.
        split: which triples to take.
        seed: of the tie-breaking, the sizes, the backgrounds and the paths.
    """
    rng = np.random.default_rng([seed, 0x70726F6D])
    triples = split_triples(split)
    used: Counter[str | tuple[str, str, str]] = Counter()

    def least_used(names: Sequence[str]) -> str:
        order = {name: rng.random() for name in names}
        choice = min(names, key=lambda name: (used[name], order[name]))
        used[choice] += 1
        return choice

    specs = []
    for i in range(n):
        options = [t for t in triples if t[2] == MOTIONS[i % len(MOTIONS)]]
        tie = {t: rng.random() for t in options}
        triple = min(options, key=lambda t: (used[t], used[t[0]] + 1.5 * used[t[1]], tie[t]))
        used.update([triple, triple[0], triple[1]])
        size, background = least_used(list(SIZES)), least_used(list(BACKGROUNDS))
        obj = place_object(rng, triple[0], triple[1], size, triple[2])
        specs.append(SceneSpec((obj,), background, seed=int(rng.integers(2**31))))
    return specs
