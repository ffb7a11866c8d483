import dataclasses
from xml.etree import ElementTree

from benchmarks import scaling as module


def test_each_sweep_moves_one_thing_alone():
    for name, (_, points) in module.SWEEPS.items():
        others = [dataclasses.replace(point, **{name: 1}) for point in points]
        assert len(points) == len(set(points)) and len(set(others)) == 1


def test_a_point_costs_its_state_and_more():
    cost = module.measure(module.Point(length=32, rows=2, width=64), 1)
    layer = 64 * (3 * 192 + 2 * 64 + 2 * 64) + 2 * 64 + 2 * 32  # MLP, q and o, k and v, norms
    state = 3 * 4 * (512 * 64 + 4 * layer + 64)
    assert state < cost.arguments < 1.01 * state  # the batch is small
    assert cost.temporary > state / 3 and cost.seconds > 0  # the gradient alone


def test_the_picture_has_a_panel_a_sweep_and_lines_that_rise_with_the_cost():
    costs = [module.Cost(0.1, 10, 10), module.Cost(0.2, 10, 30), module.Cost(0.8, 10, 70)]
    drawn = ElementTree.fromstring(
        module.picture({"rows": ("rows <8", [1, 2, 4], costs), "fsdp": ("x", [1, 8], costs[:2])})
    )
    lines = [e.attrib["points"].split() for e in drawn if e.tag.endswith("polyline")]
    assert [len(line) for line in lines] == [3, 3, 2, 2]
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights[0] > heights[1] > heights[2]  # down is larger in SVG
    rise = [heights[0] - height for height in heights[1:]]
    assert abs(rise[1] - 3 * rise[0]) < 0.5  # x 8 is three times x 2 on this axis
