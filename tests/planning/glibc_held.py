"""What glibc's heap comes to hold for storages and nodes that come and go: read from its standard input, as
`test_planning_allocators` writes them."""

from __future__ import annotations

import ctypes
import json
import sys

events, nodes, storage = json.load(sys.stdin)
libc = ctypes.CDLL("libc.so.6")
for name in ("malloc", "aligned_alloc"):
    getattr(libc, name).restype = ctypes.c_void_p
libc.malloc.argtypes, libc.aligned_alloc.argtypes = [ctypes.c_size_t], [ctypes.c_size_t, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mallopt(-2, 64 << 20)  # as `kernels.keep_freed_memory` does
libc.mallopt(-3, 1 << 30)
libc.mallopt(-1, 2**31 - 1)
for size in (1 << 20, 1 << 16, 1 << 12, 800, 480, 312, 176, 104, 56, 40, 24):  # what the interpreter has freed is taken
    for _ in range(20 if size > 1 << 12 else 3000):
        libc.malloc(size)
used, made = [[] for _ in range(2 * len(events))], 0
start = highest = libc.malloc(1 << 20) + (1 << 20)
for number, size in events:
    if size < 0:
        for block in used[number]:
            libc.free(block)
        continue
    if number < 0:
        blocks = [(libc.malloc(n), n) for n in nodes[made % len(nodes)]]
        made += 1
    else:
        blocks = [(libc.aligned_alloc(64, size), size), *((libc.malloc(n), n) for n in storage)]
    used[number] = [block for block, _ in blocks]
    highest = max([highest, *(block + n for block, n in blocks)])
print(highest - start)
