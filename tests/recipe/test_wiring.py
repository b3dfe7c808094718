"""What passes between the parts: which networks, times, texts, noises, guidance and rates each stage hands to the
functions that the other tests prove. TABLE says it stage by stage; a new stage is a row.

A stub takes the place of the network and writes down what it is asked, so nothing is trained here and 100 updates take
a second. Every setting has a value of its own, no text is zero, and no two networks have the same weights, so whatever
is mistaken for another shows.
"""

import dataclasses
import functools
import inspect
import math
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

import flowmap
import stage as stage_module
import train
from baselines import causal, consistency
from baselines import whole_clip as whole_clip_module
from cluster.files import read_tensors, write_tensors
from config import STAGES, Config, check
from fast.network import Fast
from flowmap import per_frame
from model import SIZES, CausalWan
from worlds import draws, latent_folder, sources, toy

BATCH, FRAMES, CHUNK, UPDATES, CRITIC_STEPS = 4, 6, 2, 100, 2
NULL, EMPTY = 9.0, 3.0  # every number of the negative prompt's text, and of the empty one's; the others are in [-1, 1]
SETTINGS = dict(
    frames=FRAMES, height=5, width=5, chunk=CHUNK, batch=BATCH, device="cpu", clip_norm=0.7,
    train_shift=2.0, shift=8.0, score_shift=0.5, guidance=1.75, score_guidance=2.5, prompt_dropout=0.3,
    bidirectional_lr=1e-3, teacher_forcing_lr=2e-3, trajectory_lr=3e-3, dmd_lr=4e-3, critic_lr=5e-3,
    teacher_betas=(0.1, 0.91), trajectory_betas=(0.2, 0.92), dmd_betas=(0.3, 0.93),
    ema=0.81, trajectory_ema=0.82, dmd_ema=0.83, dmd_ema_start=3, ema_ramp=False, lr_schedule="decay",
    bidirectional_steps=60, teacher_forcing_steps=70, trajectory_steps=80, dmd_steps=90, critic_steps=CRITIC_STEPS,
    trajectory_grid=16, trajectories=64, train_grid=6, rollout_steps=4, first_steps=8,
    mixed_probs=(0.2, 0.3, 0.5), teacher_forcing_weight="bell",
    window=5, sink=1, lambda_sc=0.11, lambda_align=0.13, align_warmup=0.0, align_prob=0.7, sc_through="direct")
CONSTANTS = ((consistency, "PHASES", 2), (consistency, "SHORTCUT_GRID", 8), (consistency, "LAMBDA_SCFM", 0.19),
             (consistency, "LAMBDA_RCM", 0.23), (whole_clip_module, "LAMBDA_GAN", 0.17))


def shifted(u, shift):
    return shift * u / (1 + (shift - 1) * u)


def T(k, shift=SETTINGS["shift"]):  # noqa: N802 (the papers' name)
    return {round(shifted(i / k, shift), 4) for i in range(1, k + 1)}


def rounded(t):
    return {round(x, 4) for x in t.flatten().tolist()}


# ---------------------------------------------------------------------------------------------------------------------
# The table. Who is asked, in which layout, by whom: NET/LAYOUT, a star where gradient flows, @ and the guidance. The
# networks are those of Training.nets, or a frozen one, by the stage whose weights it has. "": by the stage itself.

SCORES = {"dmd_loss": "critic/whole bidirectional/whole@score_guidance"}  # what the generator's step asks
CRITIC = {"critic_loss": "critic/whole*"}  # and what each of the critic's


@dataclass
class Row:
    group: str  # whose steps, learning rate, betas and average
    start: str | None  # the stage whose averaged weights the student and its average start from
    asks: dict  # in the student's step: function -> networks
    times: dict  # function -> the times at which it asks the student (a shift: all from 0 to 1, shifted by it)
    per: dict  # function -> what shares one of them: batch, clip or chunk
    critic: str = ""  # the stage whose averaged weights the critic starts from
    critic_asks: dict = field(default_factory=dict)
    begin_asks: str = ""  # before the first update
    terms: dict = field(default_factory=dict)  # function -> its weight beside DMD's loss
    noises: int = 2  # that are drawn for the student's step: to start from, and to compare scores at
    windowed: bool = False
    sampled: str = "causal student cm"


def regression(group, start, function, asks, times, per, noises=1, **more):
    return Row(group, start, {function: asks}, {function: times}, {function: per}, noises=noises, **more)


def whole_clip(times, per, asks=None, student="net/whole*", critic="net/whole", more_times=None, **more):
    """DMD of a bidirectional student."""
    return Row("dmd", "bidirectional", {"": student} | SCORES | (asks or {}), {"": times} | (more_times or {}),
               {"": per, "shortcut_loss": "clip"}, "bidirectional", {"": critic} | CRITIC, sampled="whole student cm",
               **more)


def rollout(start, times, asks=None, **more):
    """Asymmetric DMD on self-rollouts."""
    asks = {"": "net/rollout net/rollout* net/commit"} | SCORES | (asks or {})
    return Row("dmd", start, asks, {"": times}, {"": "batch"}, "bidirectional",
               {"": "net/rollout net/fused"} | CRITIC, windowed=True, **more)


SC, SC_ROLLOUT = {"sc_loss": "net/whole*"}, {"sc_loss": "net/rollout*"}
REFERENCE = {"": "net/rollout net/rollout* net/commit net/fused",  # without gradient, as the critic's rollouts
             "align_loss": "bidirectional/features bidirectional/features*"}
SHORTCUTS = "net/whole* ema/whole bidirectional/whole@"
TABLE = {
    "bidirectional": regression("bidirectional", None, "flow_matching_loss", "net/whole*", 2.0, "chunk",
                                sampled="whole teacher euler"),
    "teacher_forcing": regression("teacher_forcing", "bidirectional", "flow_matching_loss", "net/behind*", 2.0,
                                  "chunk", sampled="causal teacher euler"),
    "causal_cd": regression("trajectory", "teacher_forcing", "causal_cd_loss",
                            "net/behind* ema/behind teacher_forcing/behind@guidance", T(16), "chunk"),
    "scfm": regression("trajectory", "bidirectional", "shortcut_loss", SHORTCUTS + "guidance", T(8), "clip",
                       sampled="whole student euler"),
    "pcm": regression("trajectory", "bidirectional", "pcm_loss", SHORTCUTS + "guidance", T(16), "clip",
                      sampled="whole student euler"),
    "bidirectional_ode": regression("trajectory", "bidirectional", "ode_loss", "net/causal*", T(4) | {0}, "chunk", 0,
                                    begin_asks="bidirectional/whole@guidance"),
    "causal_ode": regression("trajectory", "teacher_forcing", "ode_loss", "net/behind*", T(4), "chunk", 0,
                             begin_asks="teacher_forcing/behind@guidance"),
    "dmd4": whole_clip(T(4), "clip"),
    "dmd8": whole_clip(T(8), "clip"),
    "dmd16": whole_clip(T(16), "clip"),
    "dmd4_backward": whole_clip(T(4), "batch", student="net/whole net/whole*"),
    "dmd8_backward": whole_clip(T(8), "batch", student="net/whole net/whole*"),
    "dmd16_backward": whole_clip(T(16), "batch", student="net/whole net/whole*"),
    "sc_dmd": whole_clip(T(6), "clip", SC, terms={"sc_loss": 0.11}),
    "sc_dmd_gan": whole_clip(T(6), "clip", SC | {"generator_gan_loss": ""}, student="net/whole* critic/features*",
                             critic="net/whole critic/features*", terms={"sc_loss": 0.11, "generator_gan_loss": 0.17}),
    "dmd4_scfm": whole_clip(T(4), "clip", {"shortcut_loss": SHORTCUTS + "score_guidance"}, noises=3,
                            more_times={"shortcut_loss": T(8)}, terms={"shortcut_loss": 0.19}),
    "rcm": whole_clip(T(4), "batch", {"rcm_loss": "net/whole net/whole* bidirectional/whole@score_guidance"},
                      student="net/whole net/whole*", terms={"rcm_loss": 0.23 * 50}),
    "causal_dmd": Row("dmd", "teacher_forcing", {
        "": "net/behind net/behind*", "dmd_loss": "critic/behind teacher_forcing/behind@score_guidance"},
        {"": T(4)}, {"": "batch"}, "teacher_forcing", {"": "net/behind", "critic_loss": "critic/behind*"}),
    "causvid": Row("dmd", "bidirectional_ode", {"": "net/causal*"} | SCORES, {"": T(4) | {0}}, {"": "chunk"},
                   "bidirectional", {"": "net/causal"} | CRITIC, windowed=True),
    "self_forcing": rollout("bidirectional_ode", T(8)),  # the first chunk's T(8), and within it T(4) of the others
    "causal_forcing": rollout("causal_ode", T(8)),
    "causal_forcing_pp": rollout("causal_cd", T(8)),
    "naive_sc": rollout("causal_cd", T(8), SC_ROLLOUT, terms={"sc_loss": 0.11}),
    "mixed_sc": rollout("causal_cd", T(8), SC_ROLLOUT, terms={"sc_loss": 0.11}),
    "salt": rollout("causal_cd", T(8), SC_ROLLOUT | REFERENCE, terms={"sc_loss": 0.11, "align_loss": 0.13}),
}
DMD = [stage for stage, row in TABLE.items() if row.group == "dmd"]
FILES = (train, whole_clip_module, consistency, causal)
LOSSES = ("flow_matching_loss", "causal_cd_loss", "pcm_loss", "rcm_loss", "ode_loss", "shortcut_loss", "sc_loss",
          "dmd_loss", "critic_loss", "align_loss", "generator_gan_loss", "discriminator_loss")


def test_every_stage_has_its_row():
    """Bug: a stage without a row; one that is sampled otherwise than it was trained."""
    assert set(TABLE) <= set(STAGES)
    if new := sorted(set(STAGES) - set(TABLE)):
        warnings.warn(f"nothing is known of what passes between the parts of {new}: give each a row in TABLE",
                      stacklevel=1)
    for stage, row in TABLE.items():
        how = STAGES[stage]
        assert (how.group, how.start, how.windowed) == (row.group, row.start, row.windowed)
        assert how.teacher == row.critic
        sampled = "causal" if how.causal else "whole", "student" if how.few_step else "teacher", how.solver
        assert " ".join(sampled) == row.sampled, stage


# ---------------------------------------------------------------------------------------------------------------------
# Watching

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of weights, each file with numbers of its own, and one of clips, whose texts are all different."""
    out, patch = tmp_path_factory.mktemp("wiring"), pytest.MonkeyPatch()
    patch.setitem(SIZES, "toy", dataclasses.replace(SIZES["toy"], dim=16, ffn_dim=16, num_heads=2, freq_dim=16))
    g = torch.Generator().manual_seed(0)
    for i, stage in enumerate(("bidirectional", "teacher_forcing", "causal_cd", "causal_ode", "bidirectional_ode")):
        for suffix in ("", "_raw"):
            net = CausalWan(SIZES["toy"]).init_weights(2 * i + bool(suffix))
            torch.nn.init.normal_(net.head.head.weight, std=0.01, generator=g)
            metadata = {"stage": stage, "size": "toy", "config": SETTINGS, "causal": stage != "bidirectional"}
            write_tensors(out / f"{stage}{suffix}.safetensors", net.state_dict(), metadata)
    rows = [{"latents": torch.randn(FRAMES, 3, 5, 5, generator=g), "text": 2 * torch.rand(2, 16, generator=g) - 1,
             "caption": ""} for _ in range(300)]
    latent_folder.write_shard(out / "data" / "0.safetensors", rows)
    for name, value in (("null", NULL), ("empty", EMPTY)):
        latent_folder.write_null(out / "data" / f"{name}.safetensors", torch.full((2, 16), value))
    yield SimpleNamespace(out=out, clips=torch.stack([row["latents"] for row in rows]),
                          texts=torch.stack([row["text"] for row in rows]))
    patch.undo()


class Watch:
    """A stage that runs with a stub for a network, and all that it does, in order: forwards, losses (calls of LOSSES),
    noises (draws), streams (rollouts), steps (of an optimizer), averages. An event says in which step it
    happened, on whose turn ("begin", "net", "critic 1", ...) and inside which function of LOSSES."""

    def __init__(self, home, stage, updates, **changes):
        places = dict(out=str(home.out), data=str(home.out / "data"))
        self.cfg = Config(**SETTINGS | places | dict(stage=stage) | changes)
        check(self.cfg)
        self.forwards, self.losses, self.noises, self.streams, self.steps, self.averages = [], [], [], [], [], []
        self.step, self.turn, self.inside, self.guiding, self.metrics = -1, "begin", "", False, []
        self.norms, self.keys = [], []
        with pytest.MonkeyPatch.context() as patch:
            self.spy(patch)
            self.training = train.begin(self.cfg, stage)
            self.weights = {name: {k: v.clone() for k, v in net.state_dict().items()}
                            for name, net in self.training.nets.items()}
            for self.step in updates:
                self.critics = 0
                self.metrics.append(self.training.update(self.step))
        names = {net: name for name, net in self.training.nets.items()}
        for e in self.forwards:
            e.who = names[e.net] if e.net in names else names.setdefault(e.net, in_file(home, e.net))

    def event(self, **what):
        return SimpleNamespace(step=self.step, turn=self.turn, inside=self.inside, **what)

    def spy(self, patch):
        def watched_loss(name, real):
            def call(*args, **how):
                before, self.inside = self.inside, name
                out = real(*args, **how)
                self.inside = before
                bound = inspect.signature(real).bind(*args, **how)
                bound.apply_defaults()
                loss = out[0] if isinstance(out, tuple) else out
                self.losses.append(self.event(name=name, args=SimpleNamespace(**bound.arguments), loss=loss.item(),
                                              reaches=self.reached_by(loss)))
                return out
            return call

        for name in LOSSES:
            for file in (file for file in FILES if hasattr(file, name)):
                patch.setattr(file, name, watched_loss(name, getattr(file, name)))
        for file, name, value in CONSTANTS:
            patch.setattr(file, name, value)
        guided, noises, generator = flowmap.Guided.__call__, draws.noises, draws.generator
        stream, update_ema, optimizer_step = stage_module.stream, stage_module.update_ema, stage_module.optimizer_step
        clip = torch.nn.utils.clip_grad_norm_

        def watched_guided(guide, x, t, text, **layout):
            self.guiding = True  # the two halves ask the stub, which need not write them down
            v = guided(guide, x, t, text, **layout)
            self.guiding = False
            self.note(guide.net, x, per_frame(t, x), text, v, guide, **layout)
            return v

        def watched_clip(parameters, most, *args, **kwargs):
            self.norms.append((clip(parameters, most, *args, **kwargs), most))
            return self.norms[-1][0]

        def watched_generator(*key):
            self.keys.append(key)
            return generator(*key)

        def watched_noises(indices, shape, *key):
            self.noises.append(self.event(x=noises(indices, shape, *key)))
            return self.noises[-1].x

        def watched_stream(net, noise, text, grid, **how):
            self.streams.append(self.event(k=len(grid), exit=how["exit_step"], first=how["first_exit"], noise=noise,
                                           text=text, grad=torch.is_grad_enabled()))
            return stream(net, noise, text, grid, **how)

        def watched_average(ema, net, decay):
            self.averages.append(self.event(ema=ema, net=net, decay=decay))
            return update_ema(ema, net, decay)

        def watched_step(cfg, net, optimizer, *args, **kwargs):
            trains_net = optimizer is self.training.optimizers["net"]
            self.critics += not trains_net
            self.turn = "net" if trains_net else f"critic {self.critics}"
            metrics = optimizer_step(cfg, net, optimizer, *args, **kwargs)
            norm, most = self.norms.pop()
            told = inspect.signature(optimizer_step).bind(cfg, net, optimizer, *args, **kwargs).arguments
            self.steps.append(self.event(lr=[group["lr"] for group in optimizer.param_groups], flag=told["flag"],
                                         loss=metrics["loss"].item(),
                                         clipped=most if norm == metrics["grad_norm"] else None))
            return metrics

        patch.setattr(flowmap.Guided, "__call__", watched_guided)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", watched_clip)
        for file in (draws, latent_folder, toy):
            patch.setattr(file, "generator", watched_generator)
        for file in (draws, sources):
            patch.setattr(file, "noises", watched_noises)
        patch.setattr(stage_module, "stream", watched_stream)
        patch.setattr(stage_module, "update_ema", watched_average)
        patch.setattr(stage_module, "optimizer_step", watched_step)
        patch.setattr(CausalWan, "forward", lambda net, *args, **how: self.stub(net, *args, **how))
        patch.setattr(Fast, "forward", lambda fast, *args, **how: self.stub(fast.net, *args, **how))

    def stub(self, net, x, t, text, *, commit=False, num_blocks=None, **layout):
        """A velocity, or features, that depend on all they are made of, and on a weight of the network."""
        w, t = net.head.head.weight.mean(), per_frame(t, x)
        v = x * (0.3 + w) + 0.1 * t[..., None, None, None] + 0.1 * text.mean((1, 2))[:, None, None, None, None]
        if num_blocks is not None:
            v = v.flatten(3)[..., : net.config.dim] * torch.linspace(1, num_blocks, net.config.dim)
        if layout.get("cache"):
            layout["cache"].next_frame += (x if commit else layout.get("clean", x[:, :0])).shape[1]
        if not self.guiding:
            self.note(net, x, t, text, v, commit=commit, num_blocks=num_blocks, **layout)
        return v

    def note(self, net, x, t, text, v, guide=None, chunk=None, clean=None, cache=None, commit=False, num_blocks=None,
             **others):
        layout = ("commit" if commit else "fused" if cache and clean is not None else "rollout" if cache else
                  "features" if num_blocks else "behind" if clean is not None else "causal" if chunk else "whole")
        assert chunk in (None, self.cfg.chunk)
        self.forwards.append(self.event(net=net, x=x.detach(), t=t.detach(), text=text, v=v.detach(), guide=guide,
                                        clean=clean, layout=layout, num_blocks=num_blocks, grad=v.requires_grad))

    def reached_by(self, loss):
        """The networks into which a loss sends gradient; asked in the first ten updates."""
        if self.step >= 10 or not loss.requires_grad:
            return set()
        weights = {name: net.head.head.weight if isinstance(net, CausalWan) else net.head[3].weight
                   for name, net in self.training.nets.items() if name != "ema"}
        grads = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
        return {name for name, grad in zip(weights, grads) if grad is not None and grad.any()}

    def of(self, what, step=None, turn=None, **wanted):
        """The events of a kind that are as wanted; turn "critic" means all of the critic's."""
        return [e for e in getattr(self, what) if (step is None or e.step == step)
                and (turn is None or e.turn.startswith(turn)) and all(getattr(e, k) == v for k, v in wanted.items())]

    def turns(self):
        """(step, turn) of every step of an optimizer."""
        return [(e.step, e.turn) for e in self.steps]


def in_file(home, net):
    """The stage whose weights a frozen network has."""
    assert not any(p.requires_grad for p in net.parameters()) and not net.training
    return next(path.stem for path in home.out.glob("*.safetensors") if same(net.state_dict(), read_tensors(path)[0]))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def watch(home):
    """watch(stage): what it did in its first updates."""
    return functools.cache(lambda stage: Watch(home, stage, range(UPDATES)))


# ---------------------------------------------------------------------------------------------------------------------
# The tests

def asked(events):
    """Who was asked, as in TABLE."""
    words = {}
    for e in events:
        guided = next((f"@{name}" for name in ("guidance", "score_guidance")
                       if e.guide and e.guide.w == SETTINGS[name]), f"@{e.guide.w}" if e.guide else "")
        words.setdefault(e.inside, set()).add(f"{e.who}/{e.layout}{'*' * e.grad}{guided}")
    return words


def words_of(asks):
    return {function: set(words.split()) for function, words in asks.items() if words}


@pytest.mark.parametrize("stage", TABLE)
def test_who_is_asked_by_whom(watch, stage):
    """Bug: student, average, teacher, critic or features exchanged; a teacher of other weights, without its guidance or
    with another's; a layout that sees too much or too little; gradient where there is none, or none where it is due."""
    w, row = watch(stage), TABLE[stage]
    assert asked(w.of("forwards", turn="begin")) == words_of({"": row.begin_asks})
    assert asked(w.of("forwards", turn="net")) == words_of(row.asks)
    assert asked(w.of("forwards", turn="critic")) == words_of(row.critic_asks)
    for e in w.forwards:
        if e.guide:
            assert (e.guide.null_text == NULL).all() and not (e.text == NULL).any()
        if e.layout == "features":
            assert e.num_blocks == len(e.net.blocks) // 2 == 2


@pytest.mark.parametrize("stage", TABLE)
def test_what_is_trained_from_which_weights(watch, home, stage):
    """Bug: raw weights in place of the average; a critic or an average that starts elsewhere; an optimizer of other
    parameters or with another's betas; a window of what the teacher sees, or none of what the student sees."""
    w, row = watch(stage), TABLE[stage]
    if row.group == "dmd":  # with another start, everybody else is as before
        other = Watch(home, stage, [], init="causal_ode").weights
        assert all(same(other[name], read_tensors(home.out / "causal_ode.safetensors")[0]) for name in ("net", "ema"))
        assert same(other["critic"], w.weights["critic"])
    nets, expected = w.training.nets, {"net": row.start, "ema": row.start}
    expected |= {"critic": row.critic} if row.critic else {}
    assert set(nets) == set(expected) | ({"head"} if stage == "sc_dmd_gan" else set())
    for name, start in expected.items():
        if start:
            assert same(w.weights[name], read_tensors(home.out / f"{start}.safetensors")[0])
        assert all(p.requires_grad == (name != "ema") for p in nets[name].parameters())
    assert same(w.weights["net"], w.weights["ema"]) and nets["net"] is not nets["ema"]
    for e in w.forwards:
        student = e.who in ("net", "ema")
        assert (e.net.config.window, e.net.config.sink) == ((5, 1) if student and row.windowed else (None, 0))

    betas = {"dmd": (0.3, 0.93), "trajectory": (0.2, 0.92)}.get(row.group, (0.1, 0.91))
    assert set(w.training.optimizers) == ({"net", "critic"} if row.critic else {"net"})
    for name, optimizer in w.training.optimizers.items():
        trained = [*nets[name].parameters()]
        if name == "critic" and "head" in nets:
            trained += nets["head"].parameters()
        (group,) = optimizer.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in trained} and group["betas"] == betas


def sharing(times):
    """What shares a time: all of a batch, the frames of a clip, or those of a chunk."""
    if all((t == t[0, 0]).all() for t in times):
        return "batch"
    if all((t == t[:, :1]).all() for t in times):
        return "clip"
    return "chunk" if all((t[:, ::CHUNK] == t[:, CHUNK - 1 :: CHUNK]).all() for t in times) else "frame"


def spread(times, shift, low=0.0, high=1.0):
    """The Kolmogorov-Smirnov distance between times `n` and those of shifted(u, shift), u uniform where it gives [low,
    high], in units of what chance allows."""
    u = sorted(shifted(t, 1 / shift) for t in times)
    low, high = shifted(low, 1 / shift), shifted(high, 1 / shift)
    apart = max(abs((x - low) / (high - low) - (i + 0.5) / len(u)) for i, x in enumerate(u))
    return apart * math.sqrt(len(u)) / 1.63


@pytest.mark.parametrize("stage", TABLE)
def test_times_at_which_the_student_is_trained(watch, stage):
    """Bug: another grid or shift, a time of it that never comes or that never reaches the critic, one time for a whole
    batch where every clip should have its own."""
    w, row = watch(stage), TABLE[stage]
    for function, expected in row.times.items():
        for turn in ("net", "critic") if row.critic and function == "" else ("net",):
            t = [e.t for e in w.of("forwards", turn=turn, who="net", inside=function) if e.layout != "commit"
                 and (e.grad or turn == "critic")]
            assert sharing(t) == row.per[function], turn
            if isinstance(expected, set):
                assert set().union(*map(rounded, t)) == expected, turn
            else:
                assert spread(torch.cat(t)[:, ::FRAMES].flatten().tolist(), expected) < 1
            if row.per[function] != "batch":  # the neighbours' times are others: those of clips, and those of chunks
                t = torch.stack([x[1::2] if stage == "bidirectional" else x for x in t])
                assert (t[:, 1:] == t[:, :-1]).float().mean() < 0.6
                if row.per[function] == "chunk":
                    assert (t[..., CHUNK:] == t[..., :-CHUNK]).float().mean() < 0.6
    for e in w.losses:
        if hasattr(e.args, "grid"):
            assert rounded(e.args.grid) == row.times[e.name]
        if hasattr(e.args, "edges"):  # pcm: of its two phases
            assert rounded(e.args.edges) == T(2)
    strides = {e.args.stride for e in w.of("losses", name="shortcut_loss")}
    assert strides == ({1, 2, 4, 8} if "shortcut_loss" in row.asks else set())
    if stage == "bidirectional":  # half of the clips are at one time, as in sampling
        t = torch.cat([e.t[::2] for e in w.forwards])
        assert (t == t[:, :1]).all() and len(t[:, 0].unique()) == len(t)
    if stage == "teacher_forcing":  # --teacher-forcing-weight bell, over the times of its own shift
        for e in w.losses:
            assert torch.equal(e.args.weight, flowmap.bell_weight(e.args.t, SETTINGS["train_shift"]))


@pytest.mark.parametrize("stage", DMD)
def test_times_at_which_scores_are_compared(watch, stage):
    """Bug: the shift of training or inference for that of the scores; one time for all clips; the same ones for the
    generator and the critic, or in every update."""
    t = torch.cat([e.args.t for e in watch(stage).losses if e.name in ("dmd_loss", "critic_loss")])
    assert sharing([t]) == "clip" and len(t[:, 0].unique()) == len(t) == BATCH * UPDATES * (1 + CRITIC_STEPS)
    assert spread(t[:, 0].tolist(), 0.5, 0.02, 0.98) < 1
    if stage == "rcm":
        t = torch.cat([e.args.t for e in watch(stage).of("losses", name="rcm_loss")])
        assert sharing([t]) == "clip" and spread(t[:, 0].tolist(), 8.0) < 1


@pytest.mark.parametrize("stage", TABLE)
def test_every_draw_depends_on_the_seed(home, tmp_path, stage):
    """Bug: a draw of another seed, that of the evaluation, or of none."""
    for path in home.out.glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    w = Watch(home, stage, [0, 1], seed=77, out=str(tmp_path))
    assert w.keys and {key[1] for key in w.keys} == {77}


def frames_of(*noises):
    """Noises `b ... c h w`, frame by frame, `n c h w`."""
    return torch.cat([x.flatten(0, -4) for x in noises])


def is_one_of(x, many):
    return any(x.shape == y.shape and torch.equal(x, y) for y in many)


@pytest.mark.parametrize("stage", TABLE)
def test_noises_are_drawn_anew(watch, stage):
    """Bug: one noise for the generator and the critic, for two clips, frames, steps or updates, to start from and to
    compare scores at."""
    w, row = watch(stage), TABLE[stage]
    drawn = frames_of(*(e.x for e in w.noises)).flatten(1)[:, :8]
    assert len(drawn.unique(dim=0)) == len(drawn)
    for step, turn in w.turns():
        noises = [e.x for e in w.of("noises", step, turn)]
        assert len(noises) == (row.noises if turn == "net" else 2)
        compared = [e.args.eps for e in w.of("losses", step, turn) if e.name in ("dmd_loss", "critic_loss")]
        assert all(is_one_of(eps, noises) for eps in compared)
        starts = [e.noise(1, 0) for e in w.of("streams", step, turn)]
        assert all(is_one_of(start, [x[:, 0, CHUNK : 2 * CHUNK] for x in noises]) for start in starts)
        assert not starts or not is_one_of(starts[0], [eps[:, CHUNK : 2 * CHUNK] for eps in compared])


@pytest.mark.parametrize("stage", TABLE)
def test_the_student_sees_what_was_drawn(watch, home, stage):
    """Bug: real clips where the student's own states are due, or the other way round; noise of the scores in the
    student's input; a clip with another's text."""
    w, row = watch(stage), TABLE[stage]
    for step, turn in w.turns()[:60]:
        noises, asked = [e.x for e in w.of("noises", step, turn)], w.of("forwards", step, turn, who="net", inside="")
        compared = [e.args.eps for e in w.of("losses", step, turn) if e.name in ("dmd_loss", "critic_loss")]
        starts = [x for x in noises if not is_one_of(x, compared)]
        if row.per.get("") in ("clip", "chunk"):  # real clips, noised
            (x_t, t), x0 = (asked[0].x, asked[0].t[..., None, None, None]), clips_of(home, asked[0].text)
            assert any(torch.allclose(x_t, (1 - t) * x0 + t * x, atol=1e-5) for x in starts if x.shape == x0.shape)
        elif "" in row.per and not row.windowed:  # its own states, from noise
            (noise,) = [x for x in starts if x.ndim == 6]
            assert torch.equal(asked[0].x, noise[:, 0])
            for k, (a, b) in enumerate(zip(asked, asked[1:])):
                t, s = (e.t[0, 0] for e in (a, b))
                assert torch.allclose(b.x, (1 - s) * (a.x - t * a.v) + s * noise[:, k + 1], atol=1e-5)
        for e in w.of("losses", step, turn):
            if e.name in ("flow_matching_loss", "causal_cd_loss", "pcm_loss", "rcm_loss", "shortcut_loss"):
                assert torch.equal(e.args.x0, clips_of(home, e.args.text, unless_dropped=e.args.x0))
            if e.name == "discriminator_loss":  # of the features of real clips, and of generated ones
                asked = [f for f in w.of("forwards", step, turn) if f.layout == "features"]
                (made,) = (f.args.x0 for f in w.of("losses", step, turn, name="critic_loss"))
                for f, x0 in zip(asked, (clips_of(home, asked[0].text), made)):
                    t = f.t[..., None, None, None]
                    assert torch.allclose(f.x, (1 - t) * x0 + t * compared[0], atol=1e-5)
        for f in w.of("forwards", step, turn):
            if f.layout == "behind" and not stage.endswith("_ode"):
                assert torch.equal(f.clean, clips_of(home, f.text, unless_dropped=f.clean))
            if f.layout == "rollout":
                assert f.x.shape[1] == CHUNK


def clips_of(home, text, unless_dropped=None):
    """The clips that these texts belong to; where a prompt was dropped, what is given."""
    found = (text[:, None] == home.texts).flatten(2).all(2)
    assert (found.sum(1) == 1).logical_or((text == EMPTY).flatten(1).all(1)).all()
    clips = home.clips[found.int().argmax(1)]
    return clips if unless_dropped is None else torch.where(found.any(1)[:, None, None, None, None], clips,
                                                            unless_dropped)


@pytest.mark.parametrize("stage", TABLE)
def test_prompts(watch, stage):
    """Bug: prompts of the generator for the critic, or of the last update; another prompt for the scores, for L_SC or
    for the reference than the clip was made with; prompts dropped in DMD, the negative prompt for a dropped one."""
    w, met = watch(stage), []
    apart = ("rcm_loss", "shortcut_loss")  # which look at clips of their own
    for step, turn in w.turns():
        texts = [e.text for e in w.of("forwards", step, turn) if e.inside not in apart]
        texts += [e.args.text for e in w.of("losses", step, turn) if hasattr(e.args, "text") and e.name not in apart]
        if texts:
            assert all(torch.equal(text, texts[0]) for text in texts)
            met.append(texts[0])
    seen = torch.cat(met) if met else torch.cat([e.text for e in w.forwards])
    dropped = (seen == EMPTY).flatten(1).all(1)
    if TABLE[stage].group == "dmd":
        assert not (torch.cat([e.text for e in w.forwards]) == EMPTY).any()
        first = torch.cat(met[: 300 // BATCH])  # of the folder's 300, each once
        assert len(first.flatten(1).unique(dim=0)) == 300
    else:
        assert abs(dropped.float().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / (64 if stage.endswith("_ode") else 400))
    assert not (seen == NULL).any()


@pytest.mark.parametrize("stage", DMD)
def test_scores_compare_what_the_student_made(watch, stage):
    """Bug: scores of real clips, of another step's or of the critic's; of chunks in another order."""
    w = watch(stage)
    for step in range(UPDATES):
        made = [e.x - e.t[..., None, None, None] * e.v for e in w.of("forwards", step, "net", who="net", inside="",
                                                                     grad=True)]
        (loss,) = w.of("losses", step, "net", name="dmd_loss")
        assert torch.allclose(loss.args.x0, torch.cat(made, 1), atol=1e-6) and loss.args.x0.requires_grad
        assert not loss.args.exact
        for turn in (f"critic {i}" for i in range(1, 1 + CRITIC_STEPS)):
            (loss,) = w.of("losses", step, turn, name="critic_loss")
            asked = w.of("forwards", step, turn, who="net")
            commits = [e.clean for e in asked if e.layout == "fused"]
            last = asked[-1].x - asked[-1].t[..., None, None, None] * asked[-1].v
            assert torch.allclose(loss.args.x0, torch.cat([*commits, last], 1), atol=1e-6)
    images = {e.who: e.x - e.t[..., None, None, None] * e.v for e in w.of("forwards", step, "net", inside="dmd_loss")}
    images = {"generator": torch.cat(made, 1), "critic": images.pop("critic"), "teacher": images.popitem()[1]}
    assert w.training.images.keys() == images.keys()
    assert all(torch.allclose(w.training.images[name], x, atol=1e-5) for name, x in images.items())


@pytest.mark.parametrize("stage", TABLE)
def test_the_loss_is_the_sum_of_its_terms(watch, stage):
    """Bug: a term that is logged and not learned from, counted twice, with another's weight, or without gradient."""
    w, row = watch(stage), TABLE[stage]
    for e in w.steps:
        losses = {}
        for call in w.of("losses", e.step, e.turn, inside=""):
            losses.setdefault(call.name, []).append(call.loss)
        means = {name: sum(values) / len(values) for name, values in losses.items()}
        weights = {name: 1.0 for name in (*row.asks, "dmd_loss", "critic_loss")} | row.terms
        weights |= {"discriminator_loss": 0.17, "critic_loss": 1.0}
        assert e.loss == pytest.approx(sum(weights[name] * loss for name, loss in means.items()), rel=1e-4, abs=1e-5)
        assert e.flag == ("--critic-lr" if e.turn != "net" else f"--{row.group.replace('_', '-')}-lr")
    called = {e.name for e in w.losses}
    assert set(row.terms) <= called and called >= {name for name in row.asks if name}
    for name in called:
        reached = set().union(*(e.reaches for e in w.of("losses", name=name)))
        assert reached == {"critic_loss": {"critic"}, "discriminator_loss": {"critic", "head"},
                           "generator_gan_loss": {"net", "critic", "head"}}.get(name, {"net"})


def rate(step, steps):
    """Of a learning rate: 20 updates of warm-up, and from the middle on a straight line to a tenth at the end."""
    return min(1, (step + 1) / 20, 1 if step < steps / 2 else 1 - 0.9 * (step - steps / 2) / (steps / 2))


@pytest.mark.parametrize("stage, longer", [
    *((stage, 1.0) for stage in TABLE),
    *((stage, longer) for stage in ("bidirectional", "teacher_forcing", "causal_cd", "salt") for longer in (0.5, 3.0))])
def test_learning_rates(home, stage, longer):
    """Bug: another stage's rate, the generator's for the critic; a decay that is over, or below zero, before the end,
    or not yet begun, when --train-longer changes the number of updates."""
    group = TABLE[stage].group
    steps = round(longer * SETTINGS[f"{group}_steps"])
    updates = [0, 9, steps // 2, 3 * steps // 4, steps - 1]
    w = Watch(home, stage, updates, train_longer=longer)
    assert w.cfg.steps_of(group) == steps
    for e in w.steps:
        base = SETTINGS["critic_lr" if e.turn != "net" else f"{group}_lr"]
        assert e.lr == [pytest.approx(base * rate(e.step, steps))] and 0 < e.lr[0] <= base
        assert e.clipped == SETTINGS["clip_norm"]
    assert e.lr[0] < base * 0.17
    for e in Watch(home, stage, updates[::4], train_longer=longer, lr_schedule="constant").steps:
        assert e.lr == [SETTINGS["critic_lr" if e.turn != "net" else f"{group}_lr"]]


@pytest.mark.parametrize("stage", TABLE)
def test_averages(watch, stage):
    """Bug: an average of the critic, one that is taken before the step or after every step of the critic, another
    group's decay."""
    w, group = watch(stage), TABLE[stage].group
    assert [(e.step, e.turn) for e in w.averages] == [(step, "net") for step in range(UPDATES)]
    assert all(e.ema is w.training.nets["ema"] and e.net is w.training.nets["net"] for e in w.averages)
    after = [0.0] * 3 + [0.83] * UPDATES if group == "dmd" else [0.82 if group == "trajectory" else 0.81] * UPDATES
    assert [e.decay for e in w.averages] == after[:UPDATES]


@pytest.mark.parametrize("stage", [stage for stage in DMD if TABLE[stage].windowed and stage != "causvid"])
def test_the_critic_meets_all_that_the_generator_makes(watch, stage):
    """Bug: a critic of last exits only, of one K, or of the generator's own draws, which it would know by heart; a
    first chunk tied to the others (Self Forcing; Salt Sec. 3.3; CF++ Sec. 4)."""
    w, lengths = watch(stage), (2, 4, 8) if stage in ("salt", "mixed_sc") else (4,)
    drawn = {turn: [w.of("streams", step, turn)[0] for step in range(UPDATES)] for turn in ("net", "critic 1",
                                                                                           "critic 2")}
    for turn, rollouts in drawn.items():
        assert all(r.grad == (turn == "net") for r in rollouts)
        assert {(r.k, r.exit) for r in rollouts} == {(k, e) for k in lengths for e in range(k)}
        assert {r.first for r in rollouts if r.k < 8} == set(range(8))
        assert all(r.first == r.exit for r in rollouts if r.k == 8)
        for k in lengths:
            p = {2: 0.2, 4: 0.3, 8: 0.5}[k] if len(lengths) > 1 else 1
            assert abs(sum(r.k == k for r in rollouts) - p * UPDATES) <= 4 * math.sqrt(UPDATES * p * (1 - p))
    a, b, c = ([(r.k, r.exit, r.first) for r in rollouts] for rollouts in drawn.values())
    assert all(sum(x == y for x, y in zip(p, q)) < UPDATES / 4 for p, q in ((a, b), (a, c), (b, c)))
    assert [(m["K"], m["exit_step"], m["first_exit"]) for m in w.metrics] == a


@pytest.mark.parametrize("stage, train_grid, infer_grid", [
    ("sc_dmd", 6, 3), ("sc_dmd_gan", 6, 3), ("naive_sc", 4, 2), ("mixed_sc", 8, 4), ("salt", 8, 4)])
def test_triples(watch, stage, train_grid, infer_grid):
    """Bug: ends te off the inference grid, or 0 left out; a tm of another grid than DMD supervises; L_SC at another K
    or from other states than those of DMD's own forward (Salt Eq. 9, 13)."""
    w, met = watch(stage), {"ts": set(), "tm": set(), "te": set()}
    for e in w.of("losses", name="sc_loss"):
        ts, tm, te = (torch.as_tensor(getattr(e.args, name)).flatten() for name in met)
        real = ts > te  # a clip at the last time has no triple
        assert ((ts > tm) & (tm > te))[real].all() and (ts == tm)[~real].all() and (ts == te)[~real].all()
        for name, t in zip(met, (ts, tm, te)):
            met[name] |= rounded(t[real])
        assert e.args.through == "direct" and e.turn == "net"
        assert any(torch.equal(e.args.x_ts, f.x) and torch.equal(e.args.v_ts, f.v) and f.grad
                   for f in w.of("forwards", e.step, "net", who="net", inside=""))
    grid, ends = T(train_grid), T(infer_grid)
    assert met == {"ts": grid - {min(grid)}, "tm": grid - {1}, "te": ends - {1} | {0}}
    used = {e.step for e in w.of("losses", name="sc_loss")}
    if TABLE[stage].windowed:
        assert used == {r.step for r in w.of("streams", turn="net", grad=True)
                        if r.k == train_grid and r.exit < train_grid - 1}
    else:
        assert used == set(range(UPDATES))


def test_reference_of_alignment(watch):
    """Bug: a reference of other noise, another prompt or the wrong schedule; alignment at other times or with other
    noise than the scores, at the largest K, or always (Salt Sec. 3.3)."""
    w, used = watch("salt"), 0
    for step in range(UPDATES):
        low, *reference = w.of("streams", step, "net")
        aligned = w.of("losses", step, "net", name="align_loss")
        assert len(reference) == len(aligned) <= (low.k < 8)
        if aligned:
            used, ref, args = used + 1, reference[0], aligned[0].args
            assert (ref.k, ref.exit, ref.grad) == (2 * low.k, 2 * low.exit + 1, False)
            assert ref.first == low.first  # both have 8 first steps
            assert torch.equal(ref.noise(1, 0), low.noise(1, 0)) and torch.equal(ref.text, low.text)
            (scores,) = w.of("losses", step, "net", name="dmd_loss")
            assert torch.equal(args.t, scores.args.t) and torch.equal(args.eps, scores.args.eps)
            assert torch.equal(args.x_low, scores.args.x0) and not torch.equal(args.x_ref, args.x_low)
            assert args.margin == 0.1 and args.x_low.requires_grad and not args.x_ref.requires_grad
    could = sum(r.k < 8 for r in w.of("streams", turn="net", grad=True))
    assert abs(used - 0.7 * could) < 4 * math.sqrt(0.7 * 0.3 * could)


@pytest.mark.parametrize("longer, first_steps", [(1.0, 4), (2.0, 1)])
def test_alignment_waits_a_fraction_of_the_stage(home, longer, first_steps):
    """Bug: a warm-up in updates of a run that is not --train-longer; a reference whose first chunk exits elsewhere on
    its own denser grid."""
    w = Watch(home, "salt", range(10, 60), train_longer=longer, first_steps=first_steps, align_warmup=0.25,
              align_prob=1.0)
    for step in range(10, 60):
        low, *reference = w.of("streams", step, "net")
        assert len(reference) == (low.k < 8 and step >= 0.25 * longer * SETTINGS["dmd_steps"])
        for ref in reference:  # at the same fraction of its steps
            steps, steps_of_ref = max(low.k, first_steps), max(ref.k, first_steps)
            assert (ref.first + 1) / steps_of_ref == (low.first + 1) / steps


@pytest.mark.parametrize("stage", ["bidirectional_ode", "causal_ode"])
def test_states_of_stored_trajectories(watch, stage):
    """Bug: states that are not on the teacher's path, at times they do not belong to, or of another clip's prompt."""
    w = watch(stage)
    walked = w.of("forwards", turn="begin")
    assert rounded(torch.cat([e.t for e in walked])) == T(16) and len(walked) == 16 * 64 // BATCH
    by_time = {}
    for e in walked:
        by_time.setdefault(round(e.t[0, 0].item(), 4), []).append(e)
    at = {t: (torch.cat([e.x for e in events]), torch.cat([e.text for e in events])) for t, events in by_time.items()}
    for e in w.of("forwards", turn="net"):
        assert len(e.text.unique(dim=0)) > 1
        for clip, times, text, i in zip(e.x, e.t, e.text, range(BATCH)):
            for frame, t in zip(range(FRAMES), times.tolist()):
                if t > 0:
                    states, texts = at[round(t, 4)]
                    (found,) = (states[:, frame] == clip[frame]).flatten(1).all(1).nonzero()
                    assert torch.equal(texts[found[0]], text)
            if stage == "causal_ode":  # behind the clean clip of the same sample
                assert any(torch.equal(e.clean[i], f.clean[j]) and torch.equal(f.text[j], text)
                           for f in by_time[1.0] for j in range(BATCH))
