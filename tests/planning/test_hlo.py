from pathlib import Path

import pytest

from charlstm.planning import hlo
from charlstm.planning.hlo import Array

# A loop of n steps around a loop of 7, as libtpu 0.0.52 compiles it for v5e:2x2:
#   for _ in range(n): for _ in range(7): h = tanh(h @ w), with 8 of 32 rows of h on each chip;
# then the sum of h over all chips. Without backend_config and the list of source lines.
TEXT = (Path(__file__).parents[1] / "fixtures" / "loops_v5e.hlo").read_text()
KERNEL = "bf16[256,256]{1,0:T(8,128)(2,1)S(1)}"
INNER = "  %copy.5 = "  # a line of the inner loop
SUM = "all-reduce(%x), channel_id=7, to_apply=%region_3.3"


def with_line(line, before=INNER):
    """Return TEXT with one more instruction before a line."""
    assert TEXT.count(before) == 1
    return TEXT.replace(before, f"  {line}\n{before}")


def found_loops(text):
    return sorted(hlo.loops(hlo.parse(text)), key=lambda loop: loop.loops)


def found_collectives(text):
    return hlo.collectives(hlo.parse(text))


def test_loops_are_nested_as_in_the_source():
    outer, inner = found_loops(TEXT)
    assert (outer.op_name, outer.loops, outer.is_innermost) == ("jit(f)/while", 0, False)
    assert (inner.op_name, inner.loops, inner.is_innermost) == ("jit(f)/while/body/while", 1, True)


def test_loop_constants_are_what_no_iteration_changes():
    _, inner = found_loops(TEXT)
    # The kernel, which XLA has converted to bfloat16, and the step of the counter. Not h.
    kernel = Array("bf16", (256, 256), "VMEM")
    assert inner.constants == (kernel, Array("s32", (), "HBM"))
    assert kernel.num_bytes == 2 * 256 * 256


def test_kernel_without_memory_space_is_in_hbm():
    _, inner = found_loops(TEXT.replace(KERNEL, KERNEL.replace("S(1)", "")))
    assert inner.constants[0].memory == "HBM"


def test_array_that_an_iteration_changes_is_no_constant():
    kernel = "%copy.5, %get-tuple-element.137,"
    assert TEXT.count(kernel) == 1
    _, inner = found_loops(TEXT.replace(kernel, "%copy.5, %copy.6,"))
    assert [array.dtype for array in inner.constants] == ["s32"]


def test_operations_of_a_loop_compute_or_copy_arrays():
    _, inner = found_loops(TEXT)
    # The addition of the index, a fusion and a copy.
    assert inner.operations == 3
    more = TEXT.replace(INNER, "  %copy.7 = f32[] copy(%constant.9)\n" + INNER)
    assert found_loops(more)[1].operations == 4


def test_collective_after_the_loops_is_in_none():
    (one,) = found_collectives(TEXT)
    assert (one.opcode, one.loops, one.num_bytes) == ("all-reduce", 0, 4)


@pytest.mark.parametrize(
    "call", [SUM, "fusion(%x), kind=kCustom, calls=%summing", "call(%x), to_apply=%summing"]
)
def test_collective_in_the_inner_loop_is_in_two(call):
    text = with_line(f"%y = f32[8]{{0}} {call}")
    text = text.replace(
        "ENTRY", f"%summing (x: f32[8]) -> f32[8] {{\n  %z = f32[8] {SUM}\n}}\nENTRY"
    )
    first, second = found_collectives(text)
    assert (first.loops, first.num_bytes) == (2, 32)
    assert second.loops == 0


def test_two_halves_of_a_collective_count_once():
    entry = "  %copy-done = "
    pair = (
        "%s = f32[2,3]{1,0} all-reduce-start(%x), channel_id=7\n"
        "  %d = f32[2,3]{1,0} all-reduce-done(%s)\n"
        "  %g = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), channel_id=8\n"
        "  %e = f32[8]{0} all-gather-done(%g)"
    )
    kinds = [(one.opcode, one.num_bytes) for one in found_collectives(with_line(pair, entry))]
    assert kinds == [("all-gather", 32), ("all-reduce", 24), ("all-reduce", 4)]


def test_cycles_of_a_loop_count_as_often_as_it_runs():
    def text_with(outer, inner, entry):
        cost = 'fusion(%x), backend_config={{"estimated_cycles":"{}"}}'
        text = with_line(f"%a = f32[] {cost.format(inner)}")
        for line, number in (("  %tuple.33 = ", outer), ("  %copy-done = ", entry)):
            text = text.replace(line, f"  %b = f32[] {cost.format(number)}\n{line}")
        return text

    # The outer loop runs n times, which only the run knows; the inner one 7 times.
    found = hlo.estimated_cycles(hlo.parse(text_with(outer=100, inner=3, entry=1000)))
    assert found == 1000 + 1 * (100 + 7 * 3)


def test_arrays_of_a_tuple_have_type_shape_and_memory():
    text = "(pred[], /*index=1*/f8e4m3fn[3]{0:S(3)}, s4[2,5]{1,0:T(8,128)(2,1)S(6)}, f32[0]{0})"
    assert hlo.arrays_of(text) == (
        Array("pred", (), "HBM"),
        Array("f8e4m3fn", (3,), "CMEM"),
        Array("s4", (2, 5), "S(6)"),
        Array("f32", (0,), "HBM"),
    )
    assert [array.num_bytes for array in hlo.arrays_of(text)] == [1, 3, 10, 0]


def test_text_that_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("Traceback (most recent call last):\n  %x = f32[] add(%y)\n")
