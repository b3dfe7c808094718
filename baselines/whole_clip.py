"""Few-step students that make the whole clip at once, by distribution matching (Salt Tab. 1, 2, 4, Fig. 1).

    dmd4, dmd8, dmd16             DMD on a grid of 4, 8 or 16 timesteps, from noised real clips    Salt Eq. 4
    dmd4_backward, dmd8_backward, dmd16_backward
                                  the same from the student's own states (backward simulation)     Salt Fig. 1
    sc_dmd                        DMD on 8 timesteps + lambda_sc L_SC                              Salt Eq. 10
    sc_dmd_gan                    sc_dmd + a discriminator, Salt's 'Ours-alpha'                    Salt Tab. 1

Student, teacher and critic are bidirectional and start from stage `bidirectional`.

The adversarial variant adds a small head on the critic's features that tells noised real clips from noised generated
ones. Salt says no more than 'an extra discriminator'; ours follows DMD2, with a logit per token and the critic's middle
block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster import fsdp
from dmd import critic_loss, dmd_loss, score_times
from flowmap import add_noise, intervals, renoise, schedule, to_x0
from sc_loss import draw_triples, sc_loss
from stage import Training, alternate, guide, load_finished, score_models, student_and_average, video_shape
from worlds.draws import RENOISE, TRIPLE

LAMBDA_GAN = 0.03  # weight of sc_dmd_gan's discriminator (ours)


def networks(cfg, start) -> tuple:
    """Student and its average, guided teacher and critic."""
    net, ema = student_and_average(cfg, load_finished(cfg, start))
    teacher, critic = score_models(cfg, "bidirectional")
    return net, ema, guide(cfg, teacher, cfg.score_guidance), critic


def noised_clips(cfg, draw, grid) -> tuple:
    """Noised real clips, each at its own timestep of the grid (Salt: no backward simulation): x_t, text, t `b` of this
    slice, and t of the whole batch."""
    x0, text = draw.clips()
    t = grid[torch.randint(len(grid), (cfg.batch,), generator=draw.g)]
    return add_noise(x0, draw.noise_like(x0), t[draw.batch_slice]), text, draw.mine(t), t


def denoised_clips(cfg, net, draw, grid) -> tuple:
    """What a student makes of noised_clips, x0, and its text."""
    x_t, text, t, _ = noised_clips(cfg, draw, grid)
    return to_x0(x_t, net(x_t, t, text), t), text


def score_times_and_noise(cfg, draw, x0) -> tuple[Tensor, Tensor]:
    """The timesteps at which scores are compared, one for each clip, and the noise that takes x0 there."""
    t = draw.mine(score_times(cfg.batch, cfg.frames, cfg.score_shift, draw.g))
    return t, draw.noise_like(x0, RENOISE)


def sc_dmd_loss(net, critic, teacher, x_ts: Tensor, text, ts: Tensor, tm: Tensor, te: Tensor, t: Tensor, eps: Tensor,
                lambda_sc: float, through: str = "both") -> tuple[Tensor, dict]:
    """L_DMD + lambda_sc L_SC of noisy clips (Salt Eq. 10); both read v(x_ts, ts).

    x_ts, eps: `b f c h w`. ts > tm > te: `b`, a triple of each clip (Salt Eq. 9); lambda_sc = 0 reads ts alone. t:
    `b f`, where scores are compared. through: as in sc_loss. The metrics hold those of dmd_loss, and the clips x0.
    """
    v = net(x_ts, ts, text)
    x0 = to_x0(x_ts, v, ts)
    loss, metrics = dmd_loss(x0, text, critic, teacher, t, eps)                                             # Salt Eq. 4
    if lambda_sc > 0:
        metrics["sc"], _ = sc_loss(lambda x, t: net(x, t, text), x_ts, v, ts, tm, te, through)              # Salt Eq. 8
        loss = loss + lambda_sc * metrics["sc"]                                                            # Salt Eq. 10
    return loss, metrics | {"x0": x0}


def sc_dmd(cfg, start, gan=False) -> Training:
    """Salt Eq. 10: L_DMD + lambda_sc L_SC, both on one training grid T_train; tm is from it, too, and te from the grid
    of half as many steps. With lambda_sc = 0 this is DMD (arXiv 2311.18828, 2405.14867): every timestep of the grid is
    trained as a one-step generator by itself.

    gan: Salt's 'Ours-alpha', with a discriminator on the features of the critic's middle block (as in DMD2).
    """
    net, ema, teacher, critic = networks(cfg, start)
    train_grid, head = schedule(cfg.train_grid, cfg.shift), None
    if gan:
        head = Discriminator(critic.config.dim).init_weights(cfg.seed).to(cfg.device)
        head = fsdp.shard(head, "fp32", cfg.reshard_after_forward)

    def logits(x0, text, t, eps):
        return head(critic(add_noise(x0, eps, t), t, text, num_blocks=len(critic.blocks) // 2))

    def generator_step(draw):
        x_ts, text, ts, every_ts = noised_clips(cfg, draw, train_grid)
        tm = te = ts
        if cfg.lambda_sc > 0:
            triples = draw_triples(every_ts, train_grid, train_grid[::2], draw.generator(TRIPLE))           # Salt Eq. 9
            tm, te = (draw.mine(x) for x in triples)
        t, eps = score_times_and_noise(cfg, draw, x_ts)
        loss, metrics = sc_dmd_loss(net, critic, teacher, x_ts, text, ts, tm, te, t, eps, cfg.lambda_sc, cfg.sc_through)
        if gan:
            metrics["gan"] = generator_gan_loss(logits(metrics["x0"], text, t, eps))
            loss = loss + LAMBDA_GAN * metrics["gan"]
        return loss, metrics

    def critic_step(draw):
        with torch.no_grad():
            x0, text = denoised_clips(cfg, net, draw, train_grid)
        t, eps = score_times_and_noise(cfg, draw, x0)
        loss, metrics = critic_loss(critic, x0, text, t, eps)
        if gan:
            real, text_of_real = draw.clips()
            loss = loss + LAMBDA_GAN * discriminator_loss(logits(real, text_of_real, t, eps), logits(x0, text, t, eps))
        return loss, metrics

    return alternate(cfg, net, ema, critic, generator_step, critic_step, head)


def sc_dmd_gan(cfg, start) -> Training:
    return sc_dmd(cfg, start, gan=True)


def dmd_backward(cfg, start) -> Training:
    """DMD where the student denoises states of its own path from noise. All clips share one exit step, as in
    DMD2, since it sets how many forwards run."""
    net, ema, teacher, critic = networks(cfg, start)
    grid = schedule(cfg.train_grid, cfg.shift)

    def generator_step(draw):
        x0, text, exit_step = own_state(cfg, net, draw, grid)
        loss, metrics = dmd_loss(x0, text, critic, teacher, *score_times_and_noise(cfg, draw, x0))         # Salt Eq. 4
        return loss, metrics | {"x0": x0, "exit_step": exit_step}

    def critic_step(draw):
        with torch.no_grad():
            x0, text, _ = own_state(cfg, net, draw, grid)
        return critic_loss(critic, x0, text, *score_times_and_noise(cfg, draw, x0))

    return alternate(cfg, net, ema, critic, generator_step, critic_step)


def own_state(cfg, net, draw, grid) -> tuple[Tensor, Tensor, int]:
    """Backward simulation: x0 `b f c h w` from a random step of the student's own path, its text, and that step."""
    exit_step = draw.integer(len(grid))
    noise, text = draw.noise(len(grid), *video_shape(cfg)), draw.prompts()
    return backward_simulation(net, noise, grid, exit_step, text), text, exit_step


def backward_simulation(net, noise: Tensor, grid: Tensor, exit_step: int, text, **layout) -> Tensor:
    """Backward simulation (DMD2): walk from noise to grid[exit_step] by the CM solver, without gradient, then denoise.

    noise: `b K f c h w`, K > exit_step. Returns x_0 `b f c h w`.
    """
    x, path = noise[:, 0], list(intervals(grid))
    with torch.no_grad():
        for k, (t, s) in enumerate(path[:exit_step]):
            x = renoise(x, net(x, t, text, **layout), t, s, noise[:, k + 1])
    t = path[exit_step][0]
    return to_x0(x, net(x, t, text, **layout), t)


# ---------------------------------------------------------------------------------------------------------------------
# The discriminator of the adversarial variant

class Discriminator(nn.Module):
    """Real or generated? Features of the critic, tokens `b f s d`, to logits `b f s`."""

    def __init__(self, dim: int):
        super().__init__()
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1))

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Random weights from their own generator."""
        g = torch.Generator().manual_seed(seed)
        for layer in (self.head[1], self.head[3]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) / layer.in_features**0.5)
            layer.bias.zero_()
        return self

    def forward(self, features):
        return self.head(features.float())[..., 0]


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Of logits on real and on generated clips: -log sigmoid(real) - log sigmoid(-fake), the mean."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_gan_loss(fake: Tensor) -> Tensor:
    """The generator's: -log sigmoid of the logits on its clips (non-saturating)."""
    return F.softplus(-fake).mean()


METHODS = {"sc_dmd": sc_dmd, "sc_dmd_gan": sc_dmd_gan, "dmd_backward": dmd_backward}
