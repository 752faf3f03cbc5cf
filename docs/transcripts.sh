#!/usr/bin/env bash
# Puts the demo's real output into README.md, between its two marks. Run it when what the demo prints has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
marks='<!-- transcript -->'

# Compiled anew, downloads and imports kept: those lines are not worth the wait.
rm -rf .demo/store
./dev demo > .demo/transcript 2>&1
# Of the files that are compiled, the first and the last are enough.
shown=$(awk '/^compile / { if (++n > 2) { held = $0; next } }
             held { print "…"; print held; held = ""; n = 0 }
             { print }' .demo/transcript)

{
  sed "/^$marks\$/q" README.md
  printf '```console\n$ ./dev demo\n%s\n```\n' "$shown"
  sed "1,/^$marks\$/d" README.md | sed -n "/^$marks\$/,\$p"
} > .demo/README.md
cp .demo/README.md README.md
