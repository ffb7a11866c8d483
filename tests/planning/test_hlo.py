import pytest

from open_agentrl_jax.planning import chips, hlo
from open_agentrl_jax.types import UserError

# Lines in the manner of a TPU compiler: a loop of three trips with an all-gather and the two forms of a gradient's sum.
TEXT = """\
HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.2 (input.1: bf16[64,16]) -> bf16[16,16] {
  %all-reduce.5 = bf16[64,16]{1,0:T(8,128)(2,1)} all-reduce(%input.1), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add.1
  ROOT %slice = bf16[16,16]{1,0} dynamic-slice(%all-reduce.5, %i, %zero)
}

%body.3 (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %all-gather.1 = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%w), replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, metadata={op_name="jit(step)/while/body/reshard"}
  %fusion.2 = bf16[16,16]{1,0} fusion(%dw), kind=kCustom, calls=%all-reduce-scatter.2
  %ar = f32[64,16]{1,0} all-reduce(%dx), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add.1, metadata={op_name="jit(step)/gradient"}
  %cp = (bf16[8]{0}, bf16[8]{0}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{2,3}}
}

%condition.4 (p: (s32[], f32[2])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main.5 (p: f32[2]) -> f32[2] {
  %loop = (s32[]{:T(128)}, f32[2]{0}) while(%start), condition=%condition.4, body=%body.3
  %norm = (f32[]{:T(128)}, f32[16]{0}) all-reduce(%u, %v), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add.1
}
"""  # noqa: E501
MESH = {"data": 1, "fsdp": 4, "seq": 1, "tensor": 2}


def test_collectives_have_kind_axis_bytes_and_number_of_runs():
    found = {(c.kind, c.axes, c.bytes, c.times, c.ways) for c in hlo.collectives(TEXT, MESH)}
    assert found == {
        ("all-gather", ("fsdp",), 64 * 16 * 2, 3, 4),
        ("reduce-scatter", ("fsdp",), 64 * 16 * 2, 3, 4),
        ("all-reduce", ("fsdp",), 64 * 16 * 4, 3, 4),
        ("collective-permute", ("tensor",), 8 * 2, 3, 2),
        ("all-reduce", ("fsdp", "tensor"), 4 + 16 * 4, 1, 8),
    }


def faults(mesh, at_least, tokens=100):
    return hlo.all_reduced(hlo.collectives(TEXT, mesh), at_least=at_least, tokens=tokens)


def test_a_gradient_that_is_all_reduced_is_found_and_a_norm_is_not():
    (fault,) = faults(MESH, 64 * 16 * 2)
    assert fault.source == "jit(step)/gradient"
    # Over seq it is as wrong: parameters are split over both.
    assert faults({"data": 1, "fsdp": 1, "seq": 4, "tensor": 2}, 64 * 16 * 2)
    # Over data alone it is right: each replica holds the same part of the parameters.
    assert not faults({"data": 4, "fsdp": 1, "seq": 1, "tensor": 2}, 1000)
    # A number for each of 1,024 tokens would have just these bytes.
    assert not faults(MESH, 64 * 16 * 2, tokens=64 * 16)


def test_small_arrays_in_one_operation_are_no_gradient():
    small = "(f32[16,32]{1,0}, f32[512]{0}, f32[])"
    text = TEXT.replace("%ar = f32[64,16]{1,0}", f"%ar = {small}")
    (found,) = [c for c in hlo.collectives(text, MESH) if c.source == "jit(step)/gradient"]
    assert (found.bytes, found.largest) == (2 * 512 * 4 + 4, 512 * 4)
    assert not hlo.all_reduced([found], at_least=512 * 4 + 1, tokens=100)
    assert hlo.all_reduced([found], at_least=512 * 4, tokens=100)


def test_bytes_sent_are_those_of_a_ring():
    sent = {c.kind: c.sent for c in hlo.collectives(TEXT, MESH) if c.axes == ("fsdp",)}
    assert sent["all-gather"] == 3 * 2048 * 3 / 4
    assert sent["all-reduce"] == 3 * 4096 * 2 * 3 / 4


def test_groups_that_are_not_understood_are_said_to_be():
    text = TEXT.replace("mesh['a'=4,'b'=2] {'a'}", "mesh['a'=8] {'a':(2)4}")
    assert [c.axes for c in hlo.collectives(text, MESH) if c.kind == "all-gather"] == [("?",)]


def test_what_leaves_a_slice_is_counted():
    """As the TPU compiler writes it for two slices: sends to a runtime on the host, in a loop of three trips."""
    transfer = (
        'is_host_transfer=true, frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="{name}_0",_xla_megascale_target="{{1,2}}x{{0:3}}",'
        '_xla_megascale_transfer_type="{kind}"}}'
    )
    gradient = "  %send.1 = (bf16[512,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%dw, %after), channel_id=1, "
    numbers = "  %send.2 = (f32[1,1,1024]{2,1,0:T(1,128)}, u32[], token[]) send(%x, %after), channel_id=2, "
    lines = gradient + transfer.format(name="all-reduce.10", kind="ALL_REDUCE") + "\n"
    lines += numbers + transfer.format(name="all-gather.7", kind="ALL_GATHER") + "\n"
    text = TEXT.replace("  %cp = ", lines + "  %cp = ")
    found = {c.source: c for c in hlo.collectives(text, MESH, slices=2) if c.axes == hlo.BETWEEN}
    reduced, gathered = found["all-reduce.10_0"], found["all-gather.7_0"]
    assert (reduced.kind, reduced.times, reduced.sent) == ("all-reduce", 3, 3 * 512 * 8 * 128 * 2)
    assert (gathered.kind, gathered.bytes, gathered.sent) == ("all-gather", 2 * 4096, 3 * 4096)
    assert not faults(MESH, 10**6)


def test_unknown_chips_are_refused():
    assert chips.chip("v5p:2x2x1").hbm > 95 * 2**30
    with pytest.raises(UserError, match="unknown kind 'v9x'"):
        chips.chip("v9x:2x2")


def test_a_start_of_several_arrays_counts_what_is_larger_of_taken_and_given():
    # As the GPU compiler writes them: ((taken ...), (given ...)); an all-reduce has one list.
    text = """
ENTRY %main.1 (p: f32[2]) -> f32[2] {
  %rs = ((bf16[64,16]{1,0}, f32[32]{0}), (bf16[16,16]{1,0}, f32[8]{0})) reduce-scatter-start(%a, %b), replica_groups={{0,2,4,6},{1,3,5,7}}
  %ag = ((bf16[16,16]{1,0}, f32[8]{0}), (bf16[64,16]{1,0}, /*index=1*/f32[32]{0})) all-gather-start(%c, %d), replica_groups={{0,2,4,6},{1,3,5,7}}
  %ar = (f32[64]{0}, f32[16]{0}) all-reduce-start(%u, %v), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add.1
}
"""  # noqa: E501
    both = 64 * 16 * 2 + 32 * 4
    assert [(c.kind, c.bytes, c.largest) for c in hlo.collectives(text, MESH)] == [
        ("reduce-scatter", both, 64 * 16 * 2),
        ("all-gather", both, 64 * 16 * 2),
        ("all-reduce", 80 * 4, 64 * 4),
    ]
