# From Wan 2.1's download folder and a folder of videos to a student that draws a chunk of three latent frames in four steps.
# From the project's folder: `bash runs/wan1.3b.sh`. The same command again resumes where it stopped. Not yet run on a GPU.
set -e; trap 'exit 130' INT  # Ctrl-C ends all of it, not one command
WAN=${WAN:-Wan2.1-T2V-1.3B}         # Wan-AI/Wan2.1-T2V-1.3B of Hugging Face: weights, text encoder, VAE
VIDEOS=${VIDEOS:-clips}             # a folder of videos of at least 81 frames at 16 frames per second
CAPTIONS=${CAPTIONS:-captions.csv}  # its captions: the columns video,caption
PROMPTS=${PROMPTS:-prompts.txt}     # prompts for Salt, one a line; no videos of them are needed
OUT=${OUT:-runs/wan}                # weights, checkpoints, metrics and encoded data go here
GPUS=${GPUS:-8}                     # of 80 GB; any number that divides the batch of 64 clips
ACCUM=$((64 / GPUS))                # each GPU computes one clip at a time
# Text and videos, encoded once: 16 x 60 x 104 latents of 21 frames.
[ -e "$OUT/prompts/0.safetensors" ] || python -m tools.encode_prompts "$PROMPTS" "$OUT/prompts/0.safetensors" --wan "$WAN"
python -m tools.prepare --videos "$VIDEOS" --captions "$CAPTIONS" --out "$OUT/latents" --wan "$WAN"
# Wan itself is the first stage, `bidirectional`: the start of the next stage, and Salt's teacher.
[ -e "$OUT/bidirectional.safetensors" ] || python -m tools.convert "$WAN" "$OUT" --stage bidirectional
# The autoregressive teacher, 20,000 updates; all stages use the preset `salt`, in chunks of 3 frames.
torchrun --nproc_per_node "$GPUS" train.py --size wan1.3b --stage teacher_forcing --data "$OUT/latents" --out "$OUT" --accum "$ACCUM"
# The few-step student by causal consistency distillation, 5,000 updates.
torchrun --nproc_per_node "$GPUS" train.py --size wan1.3b --stage causal_cd --data "$OUT/latents" --out "$OUT" --accum "$ACCUM"
# Salt on the student's own rollouts, 200 generator updates, from prompts alone.
torchrun --nproc_per_node "$GPUS" train.py --size wan1.3b --stage salt --data "$OUT/prompts" --out "$OUT" --accum "$ACCUM"
# A clip of 81 frames.
python sample.py --weights "$OUT/salt.safetensors" --wan "$WAN" --prompt "a red fox runs through snow" --steps 4 --out fox.mp4
