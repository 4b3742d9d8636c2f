#!/usr/bin/env bash
# test_web.sh [SHOTS [RUN [RUN2]]]: drives the web page in a real browser without a display, and leaves screenshots in
# the folder SHOTS (default runs/web_shots), with RUN beside RUN2 also some of trained runs. Without Chromium it says so
# and ends with 0.
set -euo pipefail
shots=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/web_shots}")
runs=()
for run in "${@:2}"; do runs+=("$(realpath "$run")"); done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
found=
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" > /dev/null; then found=$name; break; fi
done
if [ -z "$found" ]; then
  echo "test_web.sh: skipped, because this machine has no chromium (Debian: apt-get install chromium)"
  exit 0
fi
source scripts/_setup.sh dev
echo "== $("$found" --version)"
LLAVA_MOLE_WEB_SHOTS=$shots LLAVA_MOLE_WEB_RUNS="${runs[*]-}" python -m pytest -rs tests/serve/test_web_browser.py
echo "screenshots: $shots"
