"""Train a few-step autoregressive video model through every stage of Salt and Causal Forcing++.

    python train.py                          # the toy recipe: four stages on a laptop, about 20 minutes on 2 CPU cores
    python train.py --stage causal_cd        # one stage; it starts from what the stages before left in --out
    python train.py --stage self_forcing     # a baseline of the papers: config.STAGES lists them
    python train.py --world room             # the room (worlds/room.py), in place of the toy world
    python train.py --train-longer 3 --out runs/long      # the same recipe, three times as long
    python train.py --stage evaluate --eval-seed 1        # measure again what a run left, on other prompts and seeds
    python train.py --help                   # every flag

    torchrun --nproc_per_node 2 train.py                  # the same on 2 ranks: gloo on CPUs, nccl on GPUs
    torchrun --nproc_per_node 8 train.py --size wan1.3b --stage teacher_forcing --data latents --out runs/wan --accum 8

This file has the four stages of the recipe, each as the algorithm box of its paper, and the loop that runs them:

    stage            trains                            from              by
    bidirectional    the teacher, sees the whole clip  scratch           flow matching
    teacher_forcing  the autoregressive teacher        bidirectional     flow matching, clean past     CF++ Stage 1
    causal_cd        the few-step student              teacher_forcing   causal consistency            CF++ Eq. 3
    salt             the final student                 causal_cd         Salt Eq. 13, CF++ Stage 3

Every other method is in baselines/, the settings of all in config.py, their common parts in stage.py.

A run leaves in --out: STAGE.safetensors (EMA weights, official names) and STAGE_raw.safetensors, sheets of images,
config.json, metrics.jsonl, and STAGE.state/, checkpoints from which a stopped or killed run resumes, step for step as
if it had never stopped, on the same number of ranks or another. What is written replaces the old only when it is
complete.
"""

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import baselines.causal
import baselines.consistency
import baselines.whole_clip
import evaluate
from align import align_loss
from causal_cd import causal_cd_loss, draw_index
from cluster import checkpoint, flops, fsdp, ranks
from cluster.files import is_full, metadata_of, run_command, write_tensors, write_text
from cluster.run_folder import alone_in, append_metrics, forget_metrics_after, stopping_gently
from config import (RECIPE, STAGES, Config, budget, check, check_numbers, for_stage, parse, same_settings, start_of)
from dmd import critic_loss, dmd_loss, score_times
from flowmap import flow_matching_loss, loss_weight, schedule, shift_timesteps
from rollout import joined
from sc_loss import draw_triple, sc_loss
from stage import (START, Training, alternate, build_teacher, for_rollouts, guide, is_finished, load_finished, path_of,
                   record_of, regression, rollout, score_models, source_of, student_and_average, video_shape)
from worlds.draws import FIRST_EXIT, RENOISE, TRIPLE

# ---------------------------------------------------------------------------------------------------------------------
# The four stages of the recipe

def bidirectional(cfg, start) -> Training:
    """Flow matching on whole clips, from scratch or from a converted model that has still to learn cameras."""
    weights = load_finished(cfg, START) if path_of(cfg, START).exists() else None
    net, ema = student_and_average(cfg, weights, seed=cfg.seed)

    def loss_of(draw):
        x0, text = draw.clips()
        eps = draw.noise_like(x0)
        u = torch.rand(cfg.batch, cfg.frames // cfg.chunk, generator=draw.g)
        u[::2] = u[::2, :1]  # one t for the clip, as in sampling; in the other half one per chunk, faster (ours)
        t = draw.mine(shift_timesteps(u.repeat_interleave(cfg.chunk, 1), cfg.train_shift))
        return flow_matching_loss(net, x0, text, t, eps, loss_weight(cfg.bidirectional_weight, t, cfg.train_shift))

    return regression(cfg, "bidirectional", net, ema, loss_of)


def teacher_forcing(cfg, start) -> Training:
    """CF++ Stage 1: flow matching of every chunk given its clean past."""
    net, ema = student_and_average(cfg, load_finished(cfg, start))

    def loss_of(draw):
        x0, text = draw.clips()
        eps = draw.noise_like(x0)
        u = torch.rand(cfg.batch, cfg.frames // cfg.chunk, generator=draw.g)
        t = draw.mine(shift_timesteps(u.repeat_interleave(cfg.chunk, 1), cfg.train_shift))
        weight = loss_weight(cfg.teacher_forcing_weight, t, cfg.train_shift)
        return flow_matching_loss(net, x0, text, t, eps, weight, chunk=cfg.chunk, clean=x0)

    return regression(cfg, "teacher_forcing", net, ema, loss_of)


def causal_cd(cfg, start) -> Training:
    """CF++ Stage 2: consistency along the ODE of the autoregressive teacher, the network that it starts from."""
    weights = load_finished(cfg, start)
    teacher = guide(cfg, build_teacher(cfg, weights), cfg.guidance)
    net, ema = student_and_average(cfg, weights)
    grid = schedule(cfg.trajectory_grid, cfg.shift)

    def loss_of(draw):
        x0, text = draw.clips()
        eps = draw.noise_like(x0)
        index = draw.mine(draw_index(cfg.batch, cfg.frames, cfg.chunk, len(grid), draw.g))
        return causal_cd_loss(net, ema, teacher, x0, text, grid, index, eps, cfg.chunk)                     # CF++ Eq. 3

    return regression(cfg, "trajectory", net, ema, loss_of)


def salt(cfg, start) -> Training:
    """Salt's autoregressive training, asymmetric DMD (CF++ Stage 3) on rollouts of the student's own:

        repeat  draw K in {2, 4, 8} and an exit step below K; roll out a clip of K steps a chunk, in which every chunk
                exits there (a first chunk with more steps than K exits at one of its own); noise the clip again to one
                t; follow teacher minus critic there                                                  Salt Eq. 4
                if K = 8:        add lambda_sc L_SC, of every chunk behind its own past               Salt Eq. 8, 9
                if K in {2, 4}:  after a warm-up, with probability align_prob, roll out again from the same noise with
                                 2 K steps, and add lambda_align L_align                              Salt Eq. 11, 12

    Together: min L_DMD + lambda_sc L_SC 1[K = 8] + lambda_align L_align 1[K in {2, 4}]               Salt Eq. 13

    Self Forcing, Causal Forcing, CF++ and two rows of Salt's Table 5 are this function with other settings (STAGES in
    config.py). The student is causal; teacher and critic are bidirectional and look at the whole clip. Salt does not
    say from which grid naive_sc takes te. Ours: with a single K, tm is from T^(K) and te from T^(K/2) or 0, as they are
    from T^(8) and T^(4) in Salt.
    """
    net, ema = student_and_average(cfg, load_finished(cfg, start), windowed=True)
    teacher, critic = score_models(cfg, "bidirectional")
    guided_teacher, fast_net = guide(cfg, teacher, cfg.score_guidance), for_rollouts(cfg, net)
    largest_k, densest = max(cfg.mixed_steps), max(*cfg.mixed_steps, cfg.first_steps)
    train_grid, infer_grid = schedule(largest_k, cfg.shift), schedule(max(1, largest_k // 2), cfg.shift)

    def features(x_t, t, text):  # what Salt leaves open: those of the frozen teacher's middle block
        return teacher(x_t, t, text, num_blocks=round(0.5 * len(teacher.blocks)))

    def draw_rollout(draw):
        k = cfg.mixed_steps[int(torch.multinomial(torch.tensor(cfg.mixed_probs), 1, generator=draw.g))]
        exit_step = first_exit = draw.integer(k)
        if k < cfg.first_steps:  # the first chunk has a grid of its own, and any step of it may be its exit
            first_exit = int(torch.randint(cfg.first_steps, (), generator=draw.generator(FIRST_EXIT)))
        text, noise = draw.prompts(), draw.noise(densest, *video_shape(cfg))
        if draw.batch_slice == ranks.my_slices(cfg.batch, cfg.accum)[0]:  # ranks that differ would wait for ever
            ranks.check_in_sync(f"a rollout of {k} steps, exit {exit_step}, {first_exit} in the first chunk")
        return k, exit_step, first_exit, text, noise

    def rollout_and_l_sc(text, noise, k, exit_step, first_exit, triple):
        """A clip x0, and L_SC of every chunk that exits at ts (a first chunk may exit elsewhere)."""
        x0, l_sc = [], []
        for chunk in rollout(cfg, net, text, noise, k, exit_step, first_exit):
            x0.append(chunk.x0)
            if triple and chunk.t == triple[0]:
                def velocity(x, t, chunk=chunk):
                    return net(x, t, chunk.text, cache=chunk.cache)
                l_sc.append(sc_loss(velocity, chunk.x_t, chunk.v, *triple, cfg.sc_through)[0])              # Salt Eq. 8
        return torch.cat(x0, dim=1), l_sc

    def generator_step(draw):
        k, exit_step, first_exit, text, noise = draw_rollout(draw)
        triple = None
        if k == largest_k and cfg.lambda_sc > 0:
            ts = train_grid[exit_step].item()
            ends = draw_triple(ts, train_grid, infer_grid, draw.generator(TRIPLE))                          # Salt Eq. 9
            triple = ends and (ts, *ends)
        x0, l_sc = rollout_and_l_sc(text, noise, k, exit_step, first_exit, triple)
        t = draw.mine(score_times(cfg.batch, cfg.frames, cfg.score_shift, draw.g))
        eps = draw.noise_like(x0, RENOISE)
        loss, metrics = dmd_loss(x0, text, critic, guided_teacher, t, eps)                  # Salt Eq. 4, CF++ Eq. 6
        if l_sc:
            metrics["sc"] = torch.stack(l_sc).mean()
            loss = loss + cfg.lambda_sc * metrics["sc"]                                             # Salt Eq. 10, 13

        warm = draw.step >= cfg.align_warmup * cfg.steps_of("dmd")
        if k < largest_k and warm and cfg.lambda_align > 0 and draw.coin(cfg.align_prob):
            with torch.no_grad():  # the next denser schedule, from the same noise; 2 n of 2 K steps for n of K
                # twice as many steps for the first chunk, too, where K is at least its minimum
                longer_first = max(2 * k, cfg.first_steps) // max(k, cfg.first_steps)
                x_ref = joined(rollout(cfg, fast_net, text, noise, 2 * k, 2 * exit_step + 1,
                                       longer_first * (first_exit + 1) - 1))
            metrics["align"], _ = align_loss(features, x0, x_ref, text, t, eps)                     # Salt Eq. 11, 12
            loss = loss + cfg.lambda_align * metrics["align"]                                       # Salt Eq. 13
        return loss, metrics | {"x0": x0, "K": k, "exit_step": exit_step, "first_exit": first_exit}

    def critic_step(draw):
        k, exit_step, first_exit, text, noise = draw_rollout(draw)
        with torch.no_grad():
            x0 = joined(rollout(cfg, fast_net, text, noise, k, exit_step, first_exit))
        t = draw.mine(score_times(cfg.batch, cfg.frames, cfg.score_shift, draw.g))
        weight = loss_weight(cfg.critic_weight, t, cfg.score_shift)
        return critic_loss(critic, x0, text, t, draw.noise_like(x0, RENOISE), weight)

    return alternate(cfg, net, ema, critic, generator_step, critic_step)


METHODS = {  # by the names in config.STAGES
    "bidirectional": bidirectional, "teacher_forcing": teacher_forcing, "causal_cd": causal_cd, "salt": salt,
    **baselines.whole_clip.METHODS, **baselines.consistency.METHODS, **baselines.causal.METHODS}


def begin(cfg, stage) -> Training:
    """A stage before its first update."""
    return METHODS[STAGES[stage].method or stage](for_stage(cfg, stage), start_of(cfg, stage))


# ---------------------------------------------------------------------------------------------------------------------
# The loop: resume, update, log, save

def run_stage(cfg, stage, most=sys.maxsize, until=float("inf")) -> int:
    """Train one stage to its end, for `most` updates, or until a time. Returns how much of `most` is used up: the
    updates made, or all of it if it was asked to stop."""
    steps, weights, states = cfg.steps_of(STAGES[stage].group), path_of(cfg, stage), states_of(cfg, stage)
    if ranks.on_rank_0(lambda: is_finished(cfg, stage)):
        ranks.on_rank_0(lambda: check_finished(cfg, stage))
        say(f"{stage}: already trained, in {weights}")
        return 0
    metadata = {"stage": stage, "size": cfg.size, "step": 0, "seconds": 0.0, "nonfinite": 0, "config": asdict(cfg),
                "row": dict(STAGES[stage].settings), "data": source_of(cfg).digest()}  # a wrong --data fails now
    checkpoint.clear(states)
    if newest := checkpoint.newest_intact(states):
        metadata = ranks.on_rank_0(lambda: check_checkpoint(cfg, stage, newest, metadata["data"]))
    ranks.on_rank_0(lambda: check_start_and_teacher(cfg, stage))
    training = begin(cfg, stage)
    tensors = checkpoint.state_of(training)
    if newest:
        checkpoint.load(newest, tensors)
    first, last = metadata["step"], min(steps, metadata["step"] + most)
    began, before, stop = time.monotonic(), metadata["seconds"], False
    ranks.check_in_sync(f"{stage} from step {first} to {last}, data {metadata['data'] or cfg.world}")
    ranks.on_rank_0(lambda: forget_metrics_after(cfg.out, stage, first))
    ranks.on_rank_0(lambda: write_text(Path(cfg.out) / "config.json", json.dumps(asdict(cfg), indent=1)))
    meter = flops.Meter(cfg)
    bar = tqdm(total=steps, initial=first, desc=stage, mininterval=1, smoothing=0.05, disable=ranks.rank() > 0)
    with bar, stopping_gently() as asked_to_stop:
        for step in range(first, last):
            meter.start()
            try:
                metrics = training.update(step)
            except ValueError as e:  # damaged data
                raise ValueError(f"stage {stage}, step {step}, rank {ranks.rank()}: {e}") from e
            except FloatingPointError as e:
                metadata["nonfinite"] += 1
                metrics = {"skipped": str(e)}
                if metadata["nonfinite"] > cfg.skip_nonfinite:
                    raise ValueError(f"stage {stage}, step {step}: {e}, with another --out, or skip such updates with "
                                     f"--skip-nonfinite. What was saved last is kept in {states}") from e
            metrics = readable(metrics) | meter.stop() | counters(cfg, stage, step, metadata["nonfinite"])
            stop = ranks.any_rank(asked_to_stop or time.monotonic() > until, "whether to stop")
            bar.update()
            if ranks.rank() == 0:
                append_metrics(cfg.out, {"stage": stage, "step": step, **metrics})
                if training.images and (step + 1) % cfg.sheet_every == 0:
                    evaluate.draw_clips(cfg, {k: x[:4] for k, x in training.images.items()},
                                        Path(cfg.out) / f"{stage}_sheets" / f"{step + 1:06d}")
            if (step + 1) % cfg.save_every == 0 or step + 1 == last or stop:
                metadata |= {"step": step + 1, "seconds": before + time.monotonic() - began}
                metadata |= {k: v for k, v in metrics.items() if k.endswith("_updates")}
                checkpoint.save(states, step + 1, tensors, metadata, cfg.keep)
                say(log_line(stage, step + 1, steps, metrics))
            if stop:
                break
    if metadata["step"] == steps:
        export(cfg, stage, training, metadata)
    return most if stop else metadata["step"] - first


def states_of(cfg, stage) -> Path:
    """The folder of a stage's checkpoints."""
    return path_of(cfg, stage).with_suffix(".state")


def export(cfg, stage, training, metadata: dict):
    """Write a finished stage's weights, single files with official names: the raw ones first, then the EMA's."""
    metadata |= {k: getattr(STAGES[stage], k) for k in ("causal", "few_step", "solver")}
    metadata |= {"saved": time.time(), **training.cost}
    for net, suffix in (("net", "_raw"), ("ema", "")):
        weights = fsdp.full_state_dict(training.nets[net])
        ranks.on_rank_0(lambda w=weights, suffix=suffix: write_tensors(path_of(cfg, stage, suffix), w, metadata))


def check_checkpoint(cfg, stage, path, data) -> dict:
    """The metadata of a checkpoint; ValueError if it is of another stage, or of other settings or data."""
    metadata, states = checkpoint.metadata_of(path), states_of(cfg, stage)
    steps = cfg.steps_of(STAGES[stage].group)
    if metadata["stage"] != stage or not 0 <= metadata["step"] <= steps:
        raise ValueError(f"got {path} of stage {metadata['stage']} and step {metadata['step']}, expected one of "
                         f"{stage}, up to step {steps}: move it away, or change --out")
    same_settings(cfg, stage, states, metadata["config"])
    check_same_row(stage, states, metadata)
    check_same_data(cfg, states, metadata["data"], data)
    return metadata


def check_finished(cfg, stage):
    """ValueError if the weights that are there are not those that this command would train."""
    path = path_of(cfg, stage)
    metadata, raw = record_of(path), record_of(path_of(cfg, stage, "_raw"))
    if {metadata.get("stage"), raw.get("stage")} != {stage}:
        raise ValueError(f"got {path} of stage {metadata.get('stage')} and raw weights of {raw.get('stage')}, expected "
                         f"{stage}: restore them, or change --out")
    same_settings(cfg, stage, path, metadata["config"])
    check_same_row(stage, path, metadata)
    if "source" not in metadata:
        check_same_data(cfg, path, metadata.get("data", ""), source_of(cfg).digest())


def check_same_row(stage, path, metadata):
    now = dict(STAGES[stage].settings)
    if metadata.get("row", now) != now:  # older runs have recorded none
        raise ValueError(f"got {path}, trained with {metadata['row']} in its row of STAGES, expected today's {now}: "
                         "change --out, or the row in config.py")


def check_same_data(cfg, path, then, now):
    if then != now:
        raise ValueError(f"got --data {cfg.data or f'of the world {cfg.world}'} with other clips than {path} was "
                         "trained on, expected the same: change --data or --out")


def check_start_and_teacher(cfg, stage):
    """ValueError if a stage would start or learn from weights that were trained with other settings."""
    start, teacher = start_of(cfg, stage), "" if cfg.teacher_out else STAGES[stage].teacher
    for other in {start, teacher} - {None, ""}:
        path = path_of(cfg, other)
        metadata = metadata_of(path) if path.is_file() else {"source": "nowhere"}  # load_finished will say so
        if "source" not in metadata and isinstance(metadata.get("config"), dict):  # convert records others' weights
            same_settings(replace(cfg, init=""), other, path, metadata["config"], of_another=stage)


def counters(cfg, stage, step, nonfinite) -> dict:
    """How many updates were made and skipped, by name."""
    done, counted = step + 1 - nonfinite, {"nonfinite": nonfinite}
    if STAGES[stage].group == "dmd":
        counted |= {"generator_updates": done, "critic_updates": done * cfg.critic_steps}
    if cfg.bad_data == "skip" and cfg.data not in ("", "random"):
        counted["bad_samples"] = sum(ranks.all_gather(source_of(cfg).skipped, "how many samples were bad"))
    return counted


def readable(metrics: dict) -> dict:
    """Metrics as JSON numbers and lists. Sums, counts and squares, which can be averaged over slices of a batch, become
    the critic's loss by quarter of t and the standard deviation of chunks."""
    plain = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
    if "critic_t_sum" in plain:
        sums_and_counts = zip(plain.pop("critic_t_sum"), plain.pop("critic_t_count"))
        plain["critic_by_t"] = [s / n if n else None for s, n in sums_and_counts]
        squares_and_means = zip(plain.pop("chunk_square"), plain["chunk_mean"])
        plain["chunk_std"] = [max(0.0, square - mean**2) ** 0.5 for square, mean in squares_and_means]
    return plain


def log_line(stage, step, steps, metrics) -> str:
    """salt 50/200 | dmd_grad 0.37 | critic_loss 0.27 | K 4 | 1.8 s"""
    shown = [k for k in ("dmd_grad", "critic_loss", "sc", "align", "K") if metrics.get(k) is not None] or ["loss"]
    numbers = [f"{k} {metrics[k]:.3g}" for k in shown if isinstance(metrics.get(k), float | int)]
    return " | ".join([f"{stage} {step}/{steps}", *numbers, f"{metrics['seconds']:.2g} s"])


def say(text: str):
    if ranks.rank() == 0:
        tqdm.write(text)


# ---------------------------------------------------------------------------------------------------------------------
# The command

def main(cfg: Config) -> list[dict]:
    """Run what the config asks for. Returns the rows of the table (none if stopped before its end, or without a world,
    where nothing can be measured)."""
    check_numbers(cfg)
    if cfg.device == "cpu":
        ranks.keep_freed_memory()
    with ranks.setup(cfg.device, cfg.precision, cfg.shard_group_size, cfg.timeout, cfg.check_ranks):
        check(cfg, ranks.world())
        ranks.check_same_flags(asdict(cfg))
        if cfg.stage == "evaluate" and not ranks.on_rank_0(lambda: evaluate.finished_stages(cfg)):
            raise ValueError(f"got --out {cfg.out}, expected a folder with a trained stage: change --out, or train")
        try:
            with alone_in(cfg.out, STAGES):
                return run(cfg)
        except OSError as e:
            if is_full(e):
                raise OSError(f"got no space in {cfg.out} ({e}), expected some more: free it, or change --out. What "
                              "was saved before is as it was") from e
            raise


def run(cfg: Config) -> list[dict]:
    stages = RECIPE if cfg.stage == "all" else (cfg.stage,)
    if cfg.stage == "evaluate":
        stages = evaluate.finished_stages(cfg)
        cfg = evaluate.as_trained(cfg, stages[-1])
    shown = for_stage(cfg, stages[0]) if len(stages) == 1 else cfg
    changed = {k: v for k, v in asdict(shown).items() if v != getattr(Config, k)}
    say(f"settings that are not the defaults: {json.dumps(changed)}")
    for k in shown.mixed_steps:
        say(f"timesteps of {k} steps: {[round(t, 4) for t in schedule(k, cfg.shift).tolist()]}")
    if cfg.size == "wan1.3b" and not cfg.teacher_size and any(STAGES[stage].windowed for stage in stages):
        say(f"DMD's teacher is of --size {cfg.size}; the papers' is of 14B: --teacher-size wan14b --teacher-out FOLDER")

    (most, until), rows, measured = budget(cfg.stop_after), [], not cfg.data
    if measured:
        rows = ranks.on_rank_0(lambda: evaluate.report_world(cfg))
    for stage in stages:
        if cfg.stage != "evaluate":
            most -= run_stage(cfg, stage, most, until)
            if most == 0 or not ranks.on_rank_0(lambda stage=stage: is_finished(cfg, stage)):
                say(f"stopped; the same command resumes from {states_of(cfg, stage)}")
                return []
        if measured:
            rows += ranks.on_rank_0(lambda stage=stage: evaluate.report(cfg, stage))
    if measured:
        ranks.on_rank_0(lambda: evaluate.report_all(cfg, rows))
    return rows


if __name__ == "__main__":
    run_command(lambda: main(parse(description=__doc__)), "stopped; the same command resumes from what was saved last",
                ranks.RankError)
