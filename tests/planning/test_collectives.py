"""Collectives read from HLO as compilers write it (lines recorded of libtpu 0.0.52 and XLA:CPU)."""

import pytest

from efficient_lm.planning.collectives import axes_of, read_collectives, replica_groups

# The shape of libtpu's text: an all-gather in two fusions of one loop body is one chain, the bound
# of the loop stands in its condition, and collectives of shard_map all have the channel 1.
TPU = """HloModule jit_train_step, is_scheduled=true

%fused_computation.1 (param_0: bf16[1,16,64]) -> bf16[1,4096,64] {
  %param_0 = bf16[1,16,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.164 = bf16[1,4096,64]{2,1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=68, replica_groups=mesh['axis_0'=256] {'axis_0'}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="5"}, metadata={op_name="jit(train_step)/jvp()/while/body/closed_call/convert_element_type"}, backend_config={"flag_configs":[]}
}

%fused_computation.2 (param_1: bf16[1,16,64]) -> bf16[1,4096,64] {
  %param_1 = bf16[1,16,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.166 = bf16[1,4096,64]{2,1,0:T(8,128)(2,1)} all-gather(%param_1), channel_id=68, replica_groups=mesh['axis_0'=256] {'axis_0'}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="5"}
}

%all-reduce-scatter.3 (input: bf16[4096,64]) -> bf16[16,64] {
  %input = bf16[4096,64]{1,0} parameter(0)
  %all-reduce.9 = bf16[4096,64]{1,0} all-reduce(%input), channel_id=70, replica_groups=mesh['axis_0'=256] {'axis_0'}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[16,64]{1,0} dynamic-slice(%all-reduce.9, %x, %y)
}

%body (arg: (s32[], bf16[1,16,64])) -> (s32[], bf16[1,16,64]) {
  %fusion.1 = bf16[1,4096,64]{2,1,0} fusion(%a), kind=kCustom, calls=%fused_computation.1
  %fusion.2 = bf16[1,4096,64]{2,1,0} fusion(%a), kind=kCustom, calls=%fused_computation.2
  %fusion.3 = bf16[16,64]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
  %all-reduce.68 = (f32[4096]{0:T(1024)}, f32[4096]{0:T(1024)}) all-reduce(%c, %d), channel_id=67, replica_groups=mesh['axis_0'=256] {'axis_0'}, to_apply=%add
}

%condition (arg.1: (s32[], bf16[1,16,64])) -> pred[] {
  %constant.361 = s32[]{:T(128)} constant(32)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt.105 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.361), direction=LT
}

ENTRY %main.1 (state: bf16[1,16,64]) -> bf16[1,16,64] {
  %while.75 = (s32[]{:T(128)}, bf16[1,16,64]{1,2,0:T(8,128)(2,1)S(1)}, /*index=5*/f32[]) while(%tuple), condition=%condition, body=%body, metadata={op_name="jit(train_step)/while"}
  %all-to-all = bf16[256,1,8,16]{2,3,1,0} all-to-all(%copy), channel_id=34, replica_groups=mesh['axis_0'=256] {'axis_0'}, dimensions={0}
  %all_to_all.276 = bf16[2,128,2,1,64]{1,4,0,3,2} all-to-all(%copy.610), channel_id=1, replica_groups=mesh['axis_0'=256] {'axis_0'}, dimensions={2}
  %all_to_all.277 = bf16[2,128,2,1,64]{1,4,0,3,2} all-to-all(%copy.612), channel_id=1, replica_groups=mesh['axis_0'=256] {'axis_0'}, dimensions={2}
  %all-reduce.10 = f32[]{:T(128)} all-reduce(%e), channel_id=38, replica_groups=mesh['axis_0'=256] {'axis_0'}, to_apply=%add
}
"""  # noqa: E501


def test_parts_of_one_collective_count_once_and_loops_their_trips():
    found, notes = read_collectives(TPU, {"data": 1, "fsdp": 256})
    assert not notes
    rows = sorted((c.kind, c.bytes, c.times) for c in found)
    assert rows == sorted(
        [
            ("all-gather", 2 * 4096 * 64, 32),
            ("reduce-scatter", 2 * 4096 * 64, 32),
            ("all-reduce", 2 * 4 * 4096, 32),
            ("all-to-all", 2 * 256 * 8 * 16, 1),
            ("all-to-all", 2 * 2 * 128 * 2 * 64, 1),
            ("all-to-all", 2 * 2 * 128 * 2 * 64, 1),
            ("all-reduce", 4, 1),
        ]
    )
    assert {c.axes for c in found} == {("fsdp",)} and all(c.whole for c in found)


def test_transfers_between_slices_are_collectives_along_dcn():
    text = """ENTRY %main (x: f32[2]) -> f32[8] {
  %send.12 = (bf16[40,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) send(%fusion.20, %after-all.12), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.12 = (bf16[40,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) recv(%after-all.12), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""  # noqa: E501
    (one,), _ = read_collectives(text, {"dcn": 2, "fsdp": 4})
    assert (one.kind, one.bytes, one.axes) == ("all-reduce", 2 * 40 * 8 * 128, ("dcn",))
    assert one.group == (0, 4)


def test_trip_counts_of_backends_that_state_them():
    text = TPU.replace("body=%body,", 'body=%body, backend_config={"known_trip_count":{"n":"7"}},')
    found, _ = read_collectives(text, {"fsdp": 256})
    assert {c.times for c in found} == {7, 1}


def test_a_loop_without_a_bound_is_counted_once_and_noted():
    text = TPU.replace("%constant.361 = s32[]{:T(128)} constant(32)", "%n = s32[] parameter(1)")
    found, notes = read_collectives(text, {"fsdp": 256})
    assert {c.times for c in found} == {1} and len(notes) == 1


def test_asynchronous_starts_count_their_result():
    text = """ENTRY %main (x: f32[2]) -> f32[8] {
  %ag = (f32[2,16]{1,0}, f32[8,16]{1,0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %done = f32[8,16]{1,0} all-gather-done(%ag)
  %cp = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%y), channel_id=2, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
}
"""  # noqa: E501
    found, _ = read_collectives(text, {"data": 2, "tensor": 2})
    gather, permute = found
    assert (gather.kind, gather.bytes, gather.axes) == (
        "all-gather",
        4 * 8 * 16,
        ("data", "tensor"),
    )
    assert (permute.kind, permute.bytes, permute.axes) == ("collective-permute", 16, ("tensor",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1','axis_0'}, x", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("dimensions={0}", None),
    ],
)
def test_forms_of_replica_groups(text, expected):
    groups = replica_groups(text, 4)
    assert (groups is None) if expected is None else groups.tolist() == expected


def test_iota_groups_of_a_pod():
    groups = replica_groups("replica_groups=[8,64]<=[64,8]T(1,0), x", 512)
    assert groups.shape == (8, 64) and groups[1].tolist() == list(range(1, 512, 8))
    assert axes_of(groups[0].tolist(), {"data": 64, "tensor": 8}) == (("data",), True)


def test_groups_that_hold_a_part_of_an_axis_say_so():
    mesh = {"data": 2, "fsdp": 8}
    assert axes_of(range(8), mesh) == (("fsdp",), True)
    assert axes_of(range(4), mesh) == (("fsdp",), False)
    assert axes_of(range(16), mesh) == (("data", "fsdp"), True)
