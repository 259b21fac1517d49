#!/usr/bin/env bash
# Finding: with an older nvidia-resiliency-ext in its environment nothing of megatron-core can be imported.
# Versions: megatron-core 0.19.2, nvidia-resiliency-ext 0.4.1, torch 2.14.1.
# Behaviour: the package is optional (the extra "dev" wants 0.6.0), and a version that is too low is to be told by a comparison; but that reads
#   __version__, which 0.4.1 does not have. So `import megatron.core` fails, also for those who use nothing of it. pip takes 0.4.1 without
#   a word where no newer wheel fits (Python 3.12 with glibc 2.36).
# Output: without nvidia-resiliency-ext: megatron.core is imported
#   with it: AttributeError: module 'nvidia_resiliency_ext' has no attribute '__version__'
# What to do: keep it out of the environment of training, or at the version that the extra names; ft_launcher runs from an environment of its own.
set -euo pipefail
work=$(mktemp -d)
# shellcheck source=findings/venv.bash
. "$(dirname "${BASH_SOURCE[0]}")/venv.bash" torch==2.14.1 megatron-core==0.19.2 nvidia-resiliency-ext==0.4.1
cat > finding.py <<'EOF'
import sys

if sys.argv[1] == "without":
    sys.modules["nvidia_resiliency_ext"] = None  # as if it were not installed: importing it raises an ImportError
try:
    import megatron.core
except AttributeError as error:
    told = f"AttributeError: {error}"
else:
    told = f"{megatron.core.__name__} is imported"
print(f"{'without nvidia-resiliency-ext' if sys.argv[1] == 'without' else 'with it'}: {told}")
fails = {"without": False, "with": True}[sys.argv[1]]
assert (told == "AttributeError: module 'nvidia_resiliency_ext' has no attribute '__version__'") == fails, "behaves otherwise now"
EOF
python -W ignore finding.py without 2>/dev/null
python -W ignore finding.py with 2>/dev/null
