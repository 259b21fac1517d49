# Sourced by each finding with the packages that it needs, pinned: a virtual environment with them, its programs first on the path,
# and the script's empty folder $work entered, which is removed at the end. FINDINGS_VENV: an environment to make once and use again (else one in $work);
# FINDINGS_PYTHON: the Python to make it from (default: python3), 3.12 or newer.
# shellcheck shell=bash
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
if [ ! -x "$venv/bin/pip" ]; then
  "${FINDINGS_PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python 3.12 or newer is needed; set FINDINGS_PYTHON")'
  "${FINDINGS_PYTHON:-python3}" -m venv "$venv"
fi
"$venv/bin/pip" install --quiet --disable-pip-version-check "$@"
export PATH=$venv/bin:$PATH PYTHONWARNINGS=ignore CUDA_VISIBLE_DEVICES=
cd "$work"
