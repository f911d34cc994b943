#!/bin/sh
# The environment of the TRL rows of launch/benchmark.py and of experiments/trl_curves.py: the last
# release with DDPOTrainer, which wants other packages than rlft does. A few minutes; 2 GB with the CPU's build of torch.
#
#   experiments/trl_venv.sh DIRECTORY
#   python launch/benchmark.py --what=iteration --trl_python=DIRECTORY/bin/python
#   python experiments/trl_curves.py --trl_python=DIRECTORY/bin/python --sweep
#
# TORCH chooses another build, e.g. TORCH=torch==2.13.0+cpu where pip is told of an index that has it.
set -eu
if [ $# -ne 1 ]; then
  echo "usage: $0 DIRECTORY" >&2
  exit 2
fi
"${PYTHON:-python3.11}" -m venv "$1"
"$1/bin/pip" install --quiet "${TORCH:-torch==2.13.0}" trl==0.23.1 diffusers==0.39.0 \
  'transformers>=4.57,<5' 'peft>=0.21,<0.22' 'accelerate>=1.15,<2'
"$1/bin/python" -c 'import trl; print("TRL", trl.__version__)'
