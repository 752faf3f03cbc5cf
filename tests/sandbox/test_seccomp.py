"""The filter, run by a small interpreter of classic BPF: every verdict for every architecture."""

import struct

import pytest

from kiln.sandbox.seccomp import AARCH64, ARM, I386, TABLES, X86_64, Table, filter_program

ALLOW, EPERM, ENOTSUP, KILL = 0x7FFF0000, 0x00050001, 0x0005005F, 0x80000000


def verdict(program: bytes, *, number: int, audit: int, arguments: tuple[int, ...] = ()) -> int:
    """What the kernel would answer: struct seccomp_data run through the program (Documentation/networking/filter.rst)."""
    padded = (*arguments, *([0] * (6 - len(arguments))))
    data = struct.pack("<IIQ6Q", number, audit, 0, *padded)
    instructions = list(struct.iter_unpack("HBBI", program))
    accumulator, position = 0, 0
    while True:
        code, if_true, if_false, k = instructions[position]
        position += 1
        match code:
            case 0x20:
                accumulator = int.from_bytes(data[k : k + 4], "little")
            case 0x15:
                position += if_true if accumulator == k else if_false
            case 0x45:
                position += if_true if accumulator & k else if_false
            case 0x54:
                accumulator &= k
            case 0x06:
                return int(k)
            case _:
                raise AssertionError(f"unexpected instruction {code:#x}")


@pytest.mark.parametrize(("machine", "table"), [(m, t) for m, tables in TABLES.items() for t in tables])
def test_chmod_to_setuid_or_setgid_fails_and_any_other_chmod_does_not(machine: str, table: Table) -> None:
    program = filter_program(machine)
    for number, argument in table.chmod.items():
        for mode, wanted in ((0o755, ALLOW), (0o1777, ALLOW), (0o4755, EPERM), (0o2755, EPERM), (0o6000, EPERM)):
            arguments = (*([7] * argument), mode)
            assert verdict(program, number=number, audit=table.audit, arguments=arguments) == wanted, (number, mode)


@pytest.mark.parametrize(("machine", "table"), [(m, t) for m, tables in TABLES.items() for t in tables])
def test_extended_attributes_are_not_supported(machine: str, table: Table) -> None:
    program = filter_program(machine)
    for number in table.xattr:
        assert verdict(program, number=number, audit=table.audit) == ENOTSUP


@pytest.mark.parametrize(
    ("machine", "table", "removexattr"),
    [("x86_64", X86_64, 197), ("x86_64", I386, 235), ("aarch64", AARCH64, 14), ("aarch64", ARM, 235)],
)
def test_removing_attributes_and_everything_else_is_allowed(machine: str, table: Table, removexattr: int) -> None:
    program = filter_program(machine)
    refused = {*table.chmod, *table.xattr}
    assert verdict(program, number=removexattr, audit=table.audit) == ALLOW
    for number in range(500):
        if number not in refused:
            assert verdict(program, number=number, audit=table.audit, arguments=(0o6777,) * 6) == ALLOW


def test_x32_calls_are_judged_as_x86_64_ones() -> None:
    program = filter_program("x86_64")
    assert verdict(program, number=90 | 0x40000000, audit=X86_64.audit, arguments=(0, 0o4755)) == EPERM
    assert verdict(program, number=188 | 0x40000000, audit=X86_64.audit) == ENOTSUP


def test_a_call_of_an_architecture_the_machine_does_not_have_ends_the_process() -> None:
    assert verdict(filter_program("x86_64"), number=0, audit=AARCH64.audit) == KILL


def test_a_machine_without_a_table_is_an_error() -> None:
    with pytest.raises(KeyError):
        filter_program("pdp11")
