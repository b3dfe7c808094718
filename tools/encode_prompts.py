"""A text file of prompts to their embeddings, so that neither training nor sampling needs the text encoder in memory.

    python -m tools.encode_prompts prompts.txt prompts/0.safetensors --wan Wan2.1-T2V-1.3B --device cpu

The folder `prompts` is then train.py's --data for stages that need no video, and its file the --prompt-embeds of
sample.py. null.safetensors, the negative prompt, and empty.safetensors, the empty one, are written beside it. After a
stop the same command continues.
"""

import argparse
from pathlib import Path

import torch

from cluster.files import check_device, run_command
from wan21 import text


def parse(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m tools.encode_prompts", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prompts", type=Path, help="a text file, one prompt a line")
    p.add_argument("out", type=Path, help="a new .safetensors file")
    p.add_argument("--wan", type=Path, required=True, help="folder with Wan's text encoder")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--batch", type=int, default=8, help="prompts at a time (default: 8)")
    return p.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    check_device(args.device)
    count = text.encode_prompts(args.prompts, args.out, args.wan, args.device, args.batch)
    print(f"{args.out}: {count} prompts")


if __name__ == "__main__":
    run_command(main, "stopped; the same command continues")
