"""The reader of openb takes the published lists in all their variants, and names what is wrong in others."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from sim.openb import NodeRow, PodRow, read_nodes, read_pods
from sim.workload import WorkloadError

NODES = "sn,cpu_milli,memory_mib,gpu,model\nopenb-node-0000,64000,262144,2,P100\nopenb-node-0001,32000,262144,0,\n"
PODS = (
    "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n"
    "openb-pod-0000,12000,16384,1,460,V100M32|T4|V100M32,LS,Running,0,12537496,0\n"
    "openb-pod-0001,6000,12288,0,0,,BE,Pending,427061,,\n"
)


def write(folder: Path, text: str, packed: bool = False) -> Path:
    path = folder / ("list.csv.gz" if packed else "list.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_nodes_and_pods_are_read_plain_or_packed(tmp_path: Path, packed: bool) -> None:
    assert read_nodes(write(tmp_path, NODES, packed)) == (
        NodeRow("openb-node-0000", 64_000, 262_144, 2, "P100"),
        NodeRow("openb-node-0001", 32_000, 262_144, 0, ""),
    )
    assert read_pods(write(tmp_path, PODS, packed)) == (
        PodRow("openb-pod-0000", 12_000, 16_384, 1, 460, ("T4", "V100M32"), "LS", 0, 12_537_496),
        PodRow("openb-pod-0001", 6_000, 12_288, 0, 0, (), "BE", 427_061, None),
    )


def test_a_list_without_the_further_columns_is_read(tmp_path: Path) -> None:
    text = "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np,1000,1,8,1000\n"
    assert read_pods(write(tmp_path, text)) == (PodRow("p", 1_000, 1, 8, 1_000),)


def test_figures_that_were_written_as_fractions_are_whole_numbers_again(tmp_path: Path) -> None:
    text = "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np,1000.0,1.0,1.0,500.0\n"
    assert read_pods(write(tmp_path, text)) == (PodRow("p", 1_000, 1, 1, 500),)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("p,1000,1,1,0", "line 2, gpu_milli: 0 is wrong"),
        ("p,1000,1,1,1001", "line 2, gpu_milli: 1001 is wrong"),
        ("p,1000,1,2,500", "line 2, gpu_milli: 500 with 2 GPUs is wrong"),
        ("p,many,1,1,500", "line 2, cpu_milli: 'many' is wrong"),
        ("p,-1,1,1,500", "line 2, cpu_milli: '-1' is wrong"),
        ("p,nan,1,1,500", "line 2, cpu_milli: 'nan' is wrong"),
        ("p,inf,1,1,500", "line 2, cpu_milli: 'inf' is wrong"),
        ("p,1000,1,1", "line 2, gpu_milli: '' is wrong"),
    ],
)
def test_a_bad_pod_is_named_by_line_and_column(tmp_path: Path, row: str, complaint: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        read_pods(write(tmp_path, f"name,cpu_milli,memory_mib,num_gpu,gpu_milli\n{row}\n"))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sn,cpu_milli,memory_mib,gpu\nn,1,1,1\n", "the columns model are missing"),
        ("sn,cpu_milli,memory_mib,gpu,model\n", "holds no node"),
        ("sn,cpu_milli,memory_mib,gpu,model\nn,1,1,1,a\nn,1,1,1,a\n", "line 3, sn: 'n' is empty or comes twice"),
        ("sn,cpu_milli,memory_mib,gpu,model\n,1,1,1,a\n", "line 2, sn: '' is empty or comes twice"),
    ],
)
def test_a_bad_node_list_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        read_nodes(write(tmp_path, text))
    assert complaint in str(caught.value)


def test_a_list_without_pods_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="holds no pod"):
        read_pods(write(tmp_path, "name,cpu_milli,memory_mib,num_gpu,gpu_milli\n"))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(b"\x1f\x8b\x00broken")
    with pytest.raises(WorkloadError, match="cannot be read as CSV"):
        read_pods(path)
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(WorkloadError, match="cannot be read as CSV"):
        read_pods(path)
