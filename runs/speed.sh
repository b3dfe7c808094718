# How fast this project is on one GPU, in less than nine minutes of an H200 (estimated): numerics first, then rollouts of random
# weights. From the project's folder: `bash runs/speed.sh`. Not yet run on a GPU. In small, on a CPU:
# `SIZE=wan_tiny FLAGS="--height 4 --width 6" OUT=/tmp/speed bash runs/speed.sh`.
trap 'exit 130' INT  # Ctrl-C ends all of it, not one command
SIZE=${SIZE:-wan1.3b}     # of the network, a row of SIZES in model.py
OUT=${OUT:-results}       # numbers go here, as rollout_SIZE.json, and with _compiled and _long behind SIZE
FLAGS=${FLAGS:-}          # of all commands of tools.bench
FAILED=0                  # one command that fails leaves the others their turn, and their numbers
# What a GPU computes is what a CPU computes: rollouts, and an update of every stage.
python -m pytest -n 0 -k on_cuda tests || FAILED=1
# 81 frames: frame by frame in 1, 2 and 4 steps, and in chunks of three latent frames in 4.
python -m tools.bench --size "$SIZE" $FLAGS --rollouts 1x1x21 1x2x21 1x4x21 3x4x21 --rounds 2 --out "$OUT/rollout_$SIZE.json" || FAILED=1
# Compiled.
python -m tools.bench --size "$SIZE" $FLAGS --compile --rollouts 1x2x21 3x4x21 --rounds 2 --out "$OUT/rollout_${SIZE}_compiled.json" || FAILED=1
# 477 frames behind a window of 21 latent frames.
python -m tools.bench --size "$SIZE" $FLAGS --rollouts 3x4x120 --rounds 1 --out "$OUT/rollout_${SIZE}_long.json" || FAILED=1
echo "$SECONDS seconds" >&2; exit $FAILED
