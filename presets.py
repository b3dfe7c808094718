"""Settings of the papers' methods at Wan's size, each value with its source.

    python train.py --size wan1.3b --preset causal_forcing_pp --stage teacher_forcing --data latents --accum 64 \
        --out runs/frame_wise

A preset replaces defaults of train.Config, which are the toy's; a flag of the command line replaces a value of the
preset. Without --preset it is that of the --stage (OF_STAGE), else `salt`. Give all stages of a run the same one: it
sets the chunk, and a stage refuses to start from weights of another.

Sources:  CF++ arXiv 2605.15141, Sec. 4;  Salt arXiv 2604.03118, Sec. B;  CF code of Causal Forcing (thu-ml/Causal-
Forcing, commit 1fc7bbc);  SF code of Self Forcing (guandeh17/Self-Forcing, commit 33593df);  ours: nobody says.
Iterations of CF, SF and CF++ are critic updates, of which every fifth comes with a generator update; we count generator
updates. We read Salt's iterations in the same way, as it builds on this code.

What differs from the papers all the same, besides README's "Where we differ from the official code":
  - DMD's teacher is of --size unless --teacher-size wan14b --teacher-out FOLDER are given. Autoregressive students have
    a teacher of 14B in Salt, CF++, CF and SF.
  - DMD's critic is of --size: 1.3B as in CF and SF. CF++ says that both score models are 14B.
  - The critic's updates come before the generator's. In CF and SF the generator is first.
  - Causal ODE draws a time for every chunk, CF one for the clip.
  - Salt's autoregressive students start from `causal_cd` (--init causal_ode: the start of Causal Forcing, on which Salt
    builds). Its generator's learning rate is "2 x 1075" in the scan, perhaps 2e-5; ours is CF's, 2e-6. Its batch and
    number of updates are CF++'s.
  - SF publishes neither the training of its start nor the number of trajectories: these are CF's. Its script solves
    them at shift 8, and it trains at 5; here both are --shift.
  - CF++ leaves w(t) of CD open (Eq. 3): 1, as in CF.
"""

from model import SIZES

WAN = dict(
    frames=21, height=60, width=104,  # CF++: 81 frames of 480 x 832 pixels
    batch=64,  # CF++
    precision="bf16", checkpointing=True,  # CF, SF: mixed_precision, gradient_checkpointing
    clip_norm=10.0,  # CF, SF: max_grad_norm_generator, max_grad_norm_critic
    prompt_dropout=0.0,  # CF, SF: no prompt is dropped; guidance leads away from the negative prompt
    lr_schedule="constant",  # CF, SF: no scheduler
    save_every=20,  # ours
    # both teachers; `bidirectional` is Wan itself, which nobody trains again
    bidirectional_lr=1e-5,  # ours
    teacher_forcing_steps=20_000,  # CF++
    teacher_forcing_lr=2e-6,  # CF: lr
    teacher_forcing_weight="bell",  # CF: scheduler.training_weight
    teacher_betas=(0.0, 0.999),  # CF: beta1, beta2
    train_shift=5.0,  # CF: timestep_shift
    ema=0.0,  # CF: raw weights (ema_start_step 2,000,000,000)
    # few-step initialisation
    shift=5.0,  # CF++: t = 1, .9375, .8333, .625; CF: timestep_shift
    trajectory_grid=48,  # CF++
    guidance=3.0,  # CF: guidance_scale of causal CD, in the form v_u + w (v_c - v_u)
    trajectory_steps=5000,  # CF++
    trajectory_lr=2e-6,  # CF: lr
    trajectory_betas=(0.0, 0.999),  # CF: beta1, beta2 of causal CD
    trajectory_ema=0.99,  # CF: ema_weight, of theta-, from the first update on
    ema_ramp=False,  # CF, SF: the decay is the same in every update
    # distribution matching
    dmd_steps=200,  # CF++: 1,000 iterations
    critic_steps=5,  # CF, SF: dfake_gen_update_ratio
    dmd_lr=2e-6, critic_lr=4e-7,  # CF, SF: lr, lr_critic; Salt: the critic's
    dmd_betas=(0.0, 0.999),  # CF, SF: beta1, beta2
    dmd_ema=0.99, dmd_ema_start=40,  # CF, SF: ema_weight; ema_start_step 200 iterations
    score_shift=5.0,  # CF, SF: timestep_shift
    score_guidance=4.0,  # CF, SF: guidance_scale 3.0, in the form v_c + g (v_c - v_u)
)

ODE = dict(  # of stages that regress on trajectories of a teacher, in place of the values of causal CD above
    guidance=6.0,  # CF, SF: guidance_scale of the scripts that make trajectories
    trajectories=6_000,  # CF: ODE6KCausal. CF++ Tab. 2 makes one for each of its 80,000 videos
    trajectory_betas=(0.9, 0.999),  # CF: causal_ode_*.yaml
    trajectory_ema=0.0,  # CF: trainer/ode.py has no average
)

PRESETS = {
    "self_forcing": WAN | dict(
        chunk=3, rollout_steps=4,  # SF: num_frame_per_block, denoising_step_list
        dmd_steps=120,  # SF: 600 iterations (README)
    ),
    "causal_forcing": WAN | dict(
        chunk=3, rollout_steps=4,  # CF: causal_forcing_dmd_chunkwise.yaml; --chunk 1: its frame-wise one
    ),
    "causal_forcing_pp": WAN | dict(
        chunk=1,  # CF++: frame-wise
        rollout_steps=4,  # CF++: one student for each of 4, 2 and 1 steps: --rollout-steps 2, --rollout-steps 1
        first_steps=4,  # CF++: the first latent frame keeps 4 steps
    ),
    "salt": WAN | dict(
        chunk=3,  # Salt: chunk-wise, on Causal Forcing
        mixed_steps=(2, 4, 8), mixed_probs=(0.2, 0.4, 0.4), lambda_sc=0.2,  # Salt
        first_steps=1,  # Salt: nothing is said of a longer first chunk, so it has K steps as all others
        align_warmup=0.6,  # Salt: 600 iterations; ours: of CF++'s 1,000
    ),
    "sc_dmd": WAN | dict(  # Salt's students that are not autoregressive: dmd4, dmd8, sc_dmd, ...
        batch=16, train_grid=8,  # Salt
        dmd_steps=480,  # Salt: 2,400 iterations
        dmd_lr=1e-5, critic_lr=1e-5,  # Salt: one learning rate, "1 x 1075" in the scan
        shift=12.0,  # Salt A.1: of the 4-step inference schedule; ours: of the training grid, too
        # ours: all that Salt does not say is as for autoregressive students: critic_steps, EMA, scores, clipping
    ),
}

OF_STAGE = {  # the preset of a stage if none is given; of the others: salt
    **dict.fromkeys(("dmd4", "dmd8", "dmd4_backward", "dmd8_backward", "sc_dmd", "sc_dmd_gan", "scfm", "dmd4_scfm",
                     "pcm", "rcm"), "sc_dmd"),
    **dict.fromkeys(("bidirectional_ode", "causvid", "self_forcing"), "self_forcing"),
    **dict.fromkeys(("causal_ode", "causal_forcing"), "causal_forcing"),
    **dict.fromkeys(("causal_dmd", "causal_forcing_pp"), "causal_forcing_pp"),
}


def settings_of(size: str, stage: str, preset: str) -> dict:
    """What --size, --stage and --preset change of Config's defaults. ValueError for a preset that does not fit."""
    if size not in SIZES or SIZES[size].in_dim == 3:  # the toy world's
        if preset:
            raise ValueError(f"got --preset {preset} with --size {size}, expected none: presets are for Wan's latents, "
                             "the toy's settings are the defaults")
        return {}
    preset = preset or OF_STAGE.get(stage, "salt")
    if preset not in PRESETS:
        raise ValueError(f"got --preset {preset}, expected one of {', '.join(PRESETS)}")
    return PRESETS[preset] | (ODE if stage.endswith("_ode") else {}) | {"preset": preset}
