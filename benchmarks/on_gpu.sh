#!/usr/bin/env bash
# Everything a GPU is needed for, in five parts of at most ten minutes each, results under OUT:
#   bash benchmarks/on_gpu.sh check OUT                doctor, tests of the kernels, memory checker
#   bash benchmarks/on_gpu.sh measure OUT              kernels against ceilings and other projects
#   bash benchmarks/on_gpu.sh decode OUT [PAIR]        rollouts of shaped pairs, the naive loop
#   bash benchmarks/on_gpu.sh step OUT [PAIR]          training steps of shaped pairs against GKD
#   bash benchmarks/on_gpu.sh sweep OUT [OP [VOCAB]]   launch parameters; all ops take longer
# Runs from a checkout, with no installation of the project: only its requirements. All parts need
# torch, triton, transformers, rich, psutil and pyyaml; `check` pytest and hypothesis, and
# pytest-xdist to be done in time; `decode` and `step` accelerate; `step` rouge_score and sacrebleu.
# GKD is that of trl (with datasets) where it is installed. Exits with 1 if anything failed.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?check, measure, decode, step or sweep} out=${2:?a folder for the results}
one=${3:-} vocab=${4:-}
mkdir -p "$out"
export PYTHONPATH=.:kernels:${PYTHONPATH:-} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# Its attention plans anew for every shape, so a naive loop would be timed as planning.
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1
failed=0

verdict() { # NAME STATUS, of timeout 124, of pytest 5 where it found no test
  echo "$1: exit $2"
  [ "$2" -eq 0 ] || failed=1
}

within() { # SECONDS, or what is left of ten minutes
  local left=$((585 - SECONDS))
  echo $((left < 1 ? 1 : left < $1 ? left : $1))
}

python - <<'PY' | tee "$out/versions.txt"
import torch, transformers, triton
print("torch", torch.__version__, "triton", triton.__version__, "transformers", transformers.__version__)
print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory // 2**20, "MiB")
PY
case $part in
check)
  kernels=(tests/test_triton_switch_select.py tests/test_triton_noise.py tests/test_sample_triton.py
    tests/test_triton_divergence.py tests/test_triton_linear.py tests/test_native_cuda.py)
  timeout 120 python -m switchkd.doctor --json "$out/doctor.json" 2>&1 | tee "$out/doctor.txt"
  verdict doctor $?
  workers=() # for hundreds of kernels to compile
  python -c "import xdist" 2>/dev/null && workers=(-n 8)
  timeout -s INT -k 15 "$(within 300)" python -m pytest -q --maxfail=20 "${workers[@]}" \
    "${kernels[@]}" tests/test_decoder.py tests/test_decoder_graphs.py tests/test_cache.py 2>&1 |
    tee "$out/tests.txt" | tail -n 40
  verdict tests $?
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      # Each tensor has memory of its own, whose end the tool knows.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(within 120)" \
        compute-sanitizer --tool "$tool" --error-exitcode 3 \
        python -m pytest -q -x tests/test_triton_switch_select.py \
        -k "without_a_distribution or known_token or programs_a_row or laws" >"$out/$tool.txt" 2>&1
      verdict "$tool" $?
    done
    if command -v nvcc >/dev/null; then
      arch=$(python -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))')
      nvcc -std=c++17 -O3 -lineinfo -gencode "arch=compute_$arch,code=sm_$arch" \
        -x cu csrc/cuda/select.cu csrc/cuda/check.cpp -o "$out/check"
      for tool in memcheck racecheck synccheck; do
        timeout "$(within 90)" compute-sanitizer --tool "$tool" --error-exitcode 3 "$out/check" \
          >"$out/cuda-$tool.txt" 2>&1
        verdict "cuda, $tool" $?
      done
    fi
  fi
  ;;
measure)
  python benchmarks/kernels.py --json "$out/kernels.json" --csv "$out/kernels.csv" 2>&1 |
    tee "$out/kernels.txt" | tail -n 120
  verdict kernels $?
  ;;
decode)
  for pair in ${one:-gpt2-xl qwen2.5-1.5b}; do
    python benchmarks/rollout_speed.py --pair "$pair" --batch 8 32 \
      --json "$out/rollout-$pair.json" --csv "$out/rollout-$pair.csv" 2>&1 |
      tee "$out/rollout-$pair.txt" | tail -n 60
    verdict "$pair" $?
  done
  ;;
step)
  name=train-step${one:+-$one}
  python benchmarks/train_step.py --pair ${one:-gpt2-xl qwen2.5-1.5b} \
    --json "$out/$name.json" --csv "$out/$name.csv" 2>&1 | tee "$out/$name.txt" | tail -n 60
  verdict "$name" $?
  ;;
sweep)
  name=sweep${one:+-$one}${vocab:+-$vocab}
  python benchmarks/sweep_kernels.py ${one:+--op "$one"} ${vocab:+--vocab "$vocab"} \
    --csv "$out/$name.csv" 2>&1 | tee "$out/$name.txt" | tail -n 60
  verdict "$name" $?
  ;;
*)
  echo "part: got $part, expected check, measure, decode, step or sweep" >&2
  exit 2
  ;;
esac
exit $failed
