"""The system call filter as a classic BPF program (pure).

Its effects are those of Nix's sandbox: making a file setuid or setgid by chmod fails with EPERM, and extended
attributes (of which ACLs are one kind) with ENOTSUP, because neither survives into a store. Everything else is left to
the namespaces: a filter that tried to list what is dangerous would only break builds on newer kernels.

Numbers: arch/x86/entry/syscalls/syscall_{64,32}.tbl, include/uapi/asm-generic/unistd.h, arch/arm/tools/syscall.tbl of
Linux; struct seccomp_data and the return values: include/uapi/linux/seccomp.h.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

_LD_W_ABS, _JEQ, _JSET, _ALU_AND, _RET = 0x20, 0x15, 0x45, 0x54, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # Offsets in struct seccomp_data; an argument is 8 bytes, low half first.
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOTSUP = 1, 95
_X32_BIT = 0x40000000  # x32 calls arrive as x86_64 with this bit in the number.
_SETUID_OR_SETGID = 0o6000

_Instruction = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Table:
    """One architecture's numbers: calls that change modes (number -> index of the mode argument), and xattr calls."""

    audit: int
    chmod: dict[int, int]
    xattr: tuple[int, ...]


# The *xattrat calls, new in Linux 6.13, have one number everywhere: set, get, list (463, 464, 465).
_XATTRAT = (463, 464, 465)
X86_64 = Table(
    0xC000003E,
    {90: 1, 91: 1, 268: 2, 452: 2},  # chmod, fchmod, fchmodat, fchmodat2
    (188, 189, 190, 191, 192, 193, 194, 195, 196, *_XATTRAT),  # {,l,f}setxattr, getxattr, listxattr
)
I386 = Table(
    0x40000003,
    {15: 1, 94: 1, 306: 2, 452: 2},
    (226, 227, 228, 229, 230, 231, 232, 233, 234, *_XATTRAT),
)
AARCH64 = Table(0xC00000B7, {52: 1, 53: 2, 452: 2}, (5, 6, 7, 8, 9, 10, 11, 12, 13, *_XATTRAT))
ARM = Table(0x40000028, {15: 1, 94: 1, 333: 2, 452: 2}, (226, 227, 228, 229, 230, 231, 232, 233, 234, *_XATTRAT))

TABLES: dict[str, tuple[Table, ...]] = {"x86_64": (X86_64, I386), "aarch64": (AARCH64, ARM)}


def filter_program(machine: str) -> bytes:
    """The filter for a host of `machine` (as in uname -m), as an array of struct sock_filter. KeyError: not known.

    A call of an architecture that the machine does not have cannot happen; it ends the process.
    """
    program: list[_Instruction] = [(_LD_W_ABS, 0, 0, _ARCHITECTURE)]
    for table in TABLES[machine]:
        rules = _rules(table)
        program += [(_JEQ, 0, len(rules), table.audit), *rules]
    program.append((_RET, 0, 0, _KILL_PROCESS))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _rules(table: Table) -> list[_Instruction]:
    """What to do with a call of `table`'s architecture; ends in a verdict on every way through."""
    program: list[_Instruction] = [(_LD_W_ABS, 0, 0, _NUMBER)]
    if table is X86_64:
        program.append((_ALU_AND, 0, 0, ~_X32_BIT & 0xFFFFFFFF))
    for number in table.xattr:
        program += _when(number, [(_RET, 0, 0, _ERRNO | _ENOTSUP)])
    for number, argument in table.chmod.items():
        program += _when(
            number,
            [
                (_LD_W_ABS, 0, 0, _ARGUMENTS + 8 * argument),
                (_JSET, 0, 1, _SETUID_OR_SETGID),
                (_RET, 0, 0, _ERRNO | _EPERM),
                (_RET, 0, 0, _ALLOW),
            ],
        )
    return [*program, (_RET, 0, 0, _ALLOW)]


def _when(number: int, then: Sequence[_Instruction]) -> list[_Instruction]:
    """`then` if the accumulator holds `number`, else what follows."""
    return [(_JEQ, 0, len(then), number), *then]
