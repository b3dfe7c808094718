"""Where clips come from: worlds small enough to measure exactly, latents on disk, and random noise."""

from worlds.toy import Toy

WORLDS = {"toy": Toy()}  # by the names that --world takes
