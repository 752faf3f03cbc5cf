#!/bin/sh
# Runs in the sandbox: Lua from source, static, with the compiler among the inputs.
set -eu
out=$1
zig=/inputs/zig/ziglang/zig
# The compiler builds its C library on first use and keeps it in a cache; without a place for it, it stops.
export ZIG_GLOBAL_CACHE_DIR=/tmp/zig ZIG_LOCAL_CACHE_DIR=/tmp/zig
# The same bytes on every machine: no instruction that only this one has.
flags='-target x86_64-linux-musl -mcpu=baseline -O2 -std=gnu99 -DLUA_USE_POSIX'

started=0
for source in /inputs/lua/l*.c; do
  name=${source##*/}
  case $name in lua.c | ltests.c) continue ;; esac
  echo "compile $name"
  "$zig" cc $flags -c "$source" -o "${name%.c}.o" &
  started=$((started + 1))
  [ $((started % 2)) = 1 ] || wait
done
wait
echo "link lua, with a C library made for it"
"$zig" cc $flags -static -s -o "$out" /inputs/lua/lua.c ./*.o
"$out" -v
