"""Runs of train.py that findings share: the recipe, students beside it with other settings, and clips that they make.

ROOT has a folder for each run and training seed, as `python train.py --seed S --out ROOT/toy_seedS` leaves it; a stage
that is finished there is not trained again: delete it after a change of the code. Runs beside it begin with copies of
what they do not change.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor

import train
from cluster.files import replacing
from cluster.run_folder import alone_in
from config import STAGES, Config, config_of
from evaluate import network
from flowmap import schedule
from rollout import grids, joined, stream
from stage import guide, is_finished, path_of, video_shape
from worlds import WORLDS
from worlds.draws import EVALUATE, noises

ROOT = Path("runs/findings/recipe")


def settings_of(name: str, seed: int, fast: bool, **changes) -> Config:
    """The settings of a run, in its folder of ROOT."""
    small = dict(train_longer=1e-3, batch=2, critic_steps=1) if fast else {}
    out = ROOT / ("fast" * fast) / f"{name}_seed{seed}"
    return config_of({"seed": seed, "eval_seed": 1, "out": str(out), **changes, **small})


def trained(cfg: Config, stages) -> Config:
    """Train the stages that are not finished."""
    for stage in stages:
        if not is_finished(cfg, stage):
            with alone_in(cfg.out, STAGES):
                train.run_stage(cfg, stage)
            if not is_finished(cfg, stage):
                raise KeyboardInterrupt  # it has been asked to stop, and has saved
        train.check_finished(cfg, stage)
    return cfg


def beside(run: Config, cfg: Config, stages) -> Config:
    """cfg, with copies of finished stages of another run that its settings do not change."""
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    for stage in stages:
        if not is_finished(cfg, stage):
            for suffix in ("_raw", ""):  # in the order in which a stage leaves them
                with replacing(path_of(cfg, stage, suffix)) as fresh:
                    shutil.copyfile(path_of(run, stage, suffix), fresh)
    return cfg


@torch.no_grad()
def clips(cfg: Config, stage: str, parts: list[tuple[int, int]], labels: Tensor, **memory) -> Tensor:
    """Clips `b frames c h w` of a stage's EMA weights, those of a teacher with its guidance, from the same start noise.
    parts: (how many frames, in how many steps each), one part after the other. memory: what model.Cache keeps."""
    net, how = network(cfg, stage), STAGES[stage]
    if not how.few_step:
        net = guide(cfg, net, cfg.guidance)
    text, cache = WORLDS[cfg.world].embed(labels).to(cfg.device), net.new_cache(**memory)

    def made(frames, steps):
        def noise(i, k, first=cache.next_frame):
            shape = 1, *video_shape(cfg)[1:]
            return noises(range(len(labels)), shape, EVALUATE, cfg.eval_seed, 7, first + i, k).to(cfg.device)

        first_grid = grids(steps, cfg.shift, cfg.first_steps)[1] if how.few_step else None
        return joined(stream(net, noise, text, schedule(steps, cfg.shift), num_chunks=frames, first_grid=first_grid,
                             solver=how.solver, cache=cache, commit_last=True))

    return torch.cat([made(*part) for part in parts], dim=1)
