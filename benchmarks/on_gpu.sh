#!/usr/bin/env bash
# Everything a GPU is needed for, in five parts of at most ten minutes each, results under OUT:
#   bash benchmarks/on_gpu.sh check OUT     tests of the kernels on the device, doctor, memory checker
#   bash benchmarks/on_gpu.sh measure OUT   kernels against their ceilings and other projects
#   bash benchmarks/on_gpu.sh decode OUT    rollouts of shaped pairs against the naive loop
#   bash benchmarks/on_gpu.sh step OUT      training steps of shaped pairs against GKD
#   bash benchmarks/on_gpu.sh sweep OUT     launch parameters
# Runs from a checkout, with no installation of the project: only its requirements.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?check, measure, decode, step or sweep} out=${2:?a folder for the results}
mkdir -p "$out"
export PYTHONPATH=.:kernels:${PYTHONPATH:-} HF_HUB_OFFLINE=1
python - <<'PY' | tee "$out/versions.txt"
import torch, transformers, triton
print("torch", torch.__version__, "triton", triton.__version__, "transformers", transformers.__version__)
print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory // 2**20, "MiB")
PY
case $part in
check)
  kernels=(tests/test_triton_switch_select.py tests/test_sample_triton.py
    tests/test_triton_divergence.py tests/test_triton_linear.py tests/test_native_cuda.py)
  python -m pytest -q --maxfail=20 "${kernels[@]}" tests/test_decoder.py tests/test_decoder_graphs.py tests/test_cache.py 2>&1 | tee "$out/tests.txt" | tail -n 40
  python -m switchkd.doctor --json "$out/doctor.json" 2>&1 | tee "$out/doctor.txt"
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 3 \
        python -m pytest -q -x tests/test_triton_switch_select.py -k "1-row or undefined or split" \
        >"$out/$tool.txt" 2>&1
      echo "$tool: exit $?"
    done
    if command -v nvcc >/dev/null; then
      arch=$(python -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))')
      nvcc -std=c++17 -O3 -lineinfo -gencode "arch=compute_$arch,code=sm_$arch" \
        -x cu csrc/cuda/select.cu csrc/cuda/check.cpp -o "$out/check"
      for tool in memcheck racecheck synccheck; do
        timeout 90 compute-sanitizer --tool "$tool" --error-exitcode 3 "$out/check" \
          >"$out/cuda-$tool.txt" 2>&1
        echo "cuda, $tool: exit $?"
      done
    fi
  fi
  ;;
measure)
  python benchmarks/kernels.py --json "$out/kernels.json" --csv "$out/kernels.csv" 2>&1 |
    tee "$out/kernels.txt" | tail -n 120
  ;;
decode)
  for pair in gpt2-xl qwen2.5-1.5b; do
    python benchmarks/rollout_speed.py --pair "$pair" --batch 8 32 \
      --json "$out/rollout-$pair.json" --csv "$out/rollout-$pair.csv" 2>&1 |
      tee "$out/rollout-$pair.txt" | tail -n 60
  done
  ;;
step)
  python benchmarks/train_step.py --pair gpt2-xl qwen2.5-1.5b \
    --json "$out/train-step.json" --csv "$out/train-step.csv" 2>&1 |
    tee "$out/train-step.txt" | tail -n 60
  ;;
sweep)
  python benchmarks/sweep_kernels.py --csv "$out/sweep.csv" 2>&1 | tee "$out/sweep.txt" | tail -n 60
  ;;
*)
  echo "part: got $part, expected check, measure, decode, step or sweep" >&2
  exit 2
  ;;
esac
