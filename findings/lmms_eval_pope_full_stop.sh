#!/usr/bin/env bash
# Finding: lmms-eval's POPE scores the answers "Yes." and "No." as wrong.
# Versions: lmms-eval 0.7.3.
# Behaviour: its rule is equality with "yes" or "no" after lower() and strip(), so that a full stop, or "Yes, there is", is a wrong answer
#   and counts as neither yes nor no in precision, recall and yes ratio. The official rule takes the first sentence, and "yes" unless it has
#   a "no" or "not" among its words; MME's task in the same release takes "Yes.".
# Output: Yes: 1.0, yes : 1.0, Yes.: 0.0, No.: 0.0, Yes, there is a cat.: 0.0
# What to do: ask for "a single word", as its prompt does, look at the answers, and score with the official rule where a model ends with a dot.
set -euo pipefail
work=$(mktemp -d)
# shellcheck source=findings/venv.bash
. "$(dirname "${BASH_SOURCE[0]}")/venv.bash" --no-deps lmms-eval==0.7.3
cat > finding.py <<'EOF'
import importlib.metadata
import importlib.util

# The task's own file, which imports nothing: lmms-eval itself needs some hundred packages.
path = importlib.metadata.distribution("lmms-eval").locate_file("lmms_eval/tasks/pope/utils.py")
spec = importlib.util.spec_from_file_location("pope", path)
pope = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pope)


def score(said, truth):
    return pope.pope_process_results({"question_id": 1, "answer": truth}, [said])["pope_accuracy"]["score"]


cases = {"Yes": "yes", "yes ": "yes", "Yes.": "yes", "No.": "no", "Yes, there is a cat.": "yes"}
found = {said: score(said, truth) for said, truth in cases.items()}
print(", ".join(f"{said}: {value}" for said, value in found.items()))
assert list(found.values()) == [1.0, 1.0, 0.0, 0.0, 0.0], "behaves otherwise now"
EOF
python finding.py
