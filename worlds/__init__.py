"""Where clips come from: worlds small enough to measure exactly, latents on disk, and random noise."""

from worlds.room import Room
from worlds.toy import Toy

WORLDS = {"toy": Toy(), "room": Room()}  # by the names that --world takes
