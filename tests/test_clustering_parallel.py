"""Clustering in processes and on Dask: the same bits as in this process, little memory, and every fault one line."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_clustering import blobs, config, equal

from utils import clustering, neighbours, parallel
from utils.clustering import discover
from utils.config import ClusterConfig, UserError


def arguments(tmp_path: Path | None = None, **changes) -> list:
    """Arguments of discover: three classes of two to four blobs; memory maps where there is a folder for them."""
    features, fine = blobs([30, 24, 40, 36, 20, 25, 30, 35, 40], gap=12.0)
    coarse = np.array([0, 0, 1, 1, 1, 2, 2, 2, 2])[fine]
    every = np.ones(len(fine), bool)
    data = [features, features[::7]]
    if tmp_path:
        for i, array in enumerate(data):
            np.save(tmp_path / f"{i}.npy", array)
            data[i] = np.load(tmp_path / f"{i}.npy", mmap_mode="r")
    kept = np.arange(len(fine)) % 11 != 0
    cluster = config(assign="nearest", **changes)
    return [data[0], coarse, every, kept, data[1], coarse[::7], ["a", "b", "c"], cluster, 0, 99]


@pytest.fixture(scope="module")
def in_this_process():
    return discover(*arguments(n_jobs=1))


def children() -> set[str]:
    """The lines of ps for this process's children that are neither ended nor joblib's resource tracker."""
    command = ["ps", "-ww", "-o", "pid=,stat=,args=", "--ppid", str(os.getpid())]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return {line for line in lines if "loky" in line and "tracker" not in line}


# Processes


@pytest.mark.parametrize("on_disk", [True, False])
def test_processes_find_the_same_bits(tmp_path, in_this_process, on_disk):
    told = []
    found = discover(
        *arguments(tmp_path if on_disk else None, n_jobs=2), progress=lambda name, entry: told.append((name, entry))
    )
    assert equal(found, in_this_process)
    assert {name: entry for name, entry in told} == found.classes and len(told) == 3
    assert not children()


def test_the_parent_of_processes_imports_neither_umap_nor_numba():
    code = (
        "import sys; sys.path[:0] = ['.', 'tests']\n"
        "from test_clustering_parallel import arguments, discover\n"
        "for name in [m for m in sys.modules if m.split('.')[0] in ('umap', 'numba')]: del sys.modules[name]\n"
        "discover(*arguments(n_jobs=2, n_epochs=5))\n"
        "assert not {'umap', 'numba', 'torch'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_number_of_processes():
    assert parallel.n_processes(5, 3) == 3 and parallel.n_processes(2, 3) == 2 and parallel.n_processes(4, 0) == 1
    assert 1 <= parallel.n_processes(0, 1000) <= os.cpu_count()


def test_largest_class_goes_first(monkeypatch):
    told = []
    monkeypatch.setattr(clustering, "_embed", lambda x, cluster, seed, found: x[:, :4].copy())
    discover(*arguments(n_jobs=1), progress=lambda name, entry: told.append(name))
    assert told == ["c", "b", "a"]


def test_a_process_has_one_thread():
    assert list(parallel.in_processes(threads, [(), ()], 2)) == [["1"] * 3] * 2


def threads() -> list[str]:
    return [os.environ[f"{name}_NUM_THREADS"] for name in ("OMP", "OPENBLAS", "NUMBA")]


def test_no_more_calls_are_drawn_than_twice_the_processes():
    drawn = []
    calls = ((drawn.append(i) or (2.0 if i else 0.1),) for i in range(8))
    results = parallel.in_processes(time.sleep, calls, 2)
    next(results)
    assert drawn == [0, 1, 2, 3]
    results.close()


def test_features_that_are_not_finite_stop_processes_in_one_line():
    bad = arguments(n_jobs=2)
    bad[0][5, 3] = np.nan
    with pytest.raises(UserError, match=r"^features: 1 of \d+ rows of a coarse class are not finite"):
        discover(*bad)
    assert not children()


def test_a_killed_process_is_one_line_that_names_memory():
    with pytest.raises(UserError, match="one of 2 processes was killed, most likely because memory ran out"):
        list(parallel.in_processes(die, [(), ()], 2))
    assert not children()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_interruption_ends_all_processes():
    threading.Timer(3.0, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        list(parallel.in_processes(time.sleep, [(60,), (60,)], 2))
    assert not children()


# Search on a device


def test_search_ahead_on_a_device_finds_the_same_labels(monkeypatch, in_this_process):
    torch_search = neighbours._TorchSearch
    monkeypatch.setattr(neighbours, "_TorchSearch", lambda points, device: torch_search(points, "cpu"))
    found = discover(*arguments(n_jobs=2), device="cuda")
    assert np.array_equal(found.labels, in_this_process.labels)


def test_the_search_is_chosen_by_settings_rows_and_kind_of_device(monkeypatch):
    monkeypatch.setattr(clustering, "CPU_EXACT_ROWS", 50)
    x = blobs([60])[0]

    def is_exact(rows, device="cpu", **changes) -> bool:
        return clustering.find_neighbours(x[:rows], config(**changes), device) is not None

    monkeypatch.setattr(neighbours, "exact_neighbours", lambda *arguments: arguments)
    assert is_exact(50) and not is_exact(51) and is_exact(51, "cuda")
    assert is_exact(51, knn="exact") and not is_exact(50, knn="umap") and not is_exact(50, "cuda", metric="manhattan")


def test_exact_neighbours_of_another_metric_are_refused():
    with pytest.raises(UserError, match="cluster.knn: exact does not know cluster.metric=manhattan"):
        ClusterConfig(knn="exact", metric="manhattan")


# Memberships in chunks


@pytest.mark.parametrize("rounding", [1, 6])  # rounding makes duplicates, whose memberships are NaN or infinite
def test_membership_chunks_are_hdbscans(rounding):
    import hdbscan

    points = blobs([40, 30, 50, 20], d=3, gap=9.0)[0].round(rounding).astype(np.float64)
    with np.errstate(all="ignore"):
        clusterer = hdbscan.HDBSCAN(min_cluster_size=5, min_samples=5, prediction_data=True).fit(points)
        whole = hdbscan.all_points_membership_vectors(clusterer)
        for memory_mb in (0, 0.001, 64):
            rows, parts = zip(*clustering.membership_chunks(clusterer, memory_mb), strict=True)
            assert np.concatenate(parts) == pytest.approx(whole, abs=1e-12, nan_ok=True)
        assert rows == (slice(0, 140),) and whole.shape[1] > 1


# Dask


@pytest.fixture(scope="module")
def dask_cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, protocol="tcp") as cluster:
        yield cluster


def test_dask_finds_the_same_bits(tmp_path, in_this_process, dask_cluster):
    told = []
    address = dask_cluster.scheduler_address
    changes = {"joblib_backend": "dask", "dask_scheduler": address}
    found = discover(*arguments(tmp_path, **changes), progress=lambda name, entry: told.append(name))
    assert equal(found, in_this_process) and sorted(told) == ["a", "b", "c"]


def test_features_that_are_not_finite_stop_dask_in_one_line(dask_cluster):
    bad = arguments(joblib_backend="dask", dask_scheduler=dask_cluster.scheduler_address)
    bad[0][5, 3] = np.nan
    with pytest.raises(UserError, match=r"^features: 1 of \d+ rows of a coarse class are not finite"):
        discover(*bad)


def test_a_killed_dask_worker_is_one_line_that_names_memory(dask_cluster):
    dask_cluster.scheduler.allowed_failures = 0
    with pytest.raises(UserError, match="cluster.dask_scheduler: a worker was killed, most likely because memory"):
        list(parallel.on_dask(die, [(), ()], 0, dask_cluster.scheduler_address))


def test_a_scheduler_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(parallel, "CONNECT_SECONDS", 0.5)
    with pytest.raises(UserError, match="cluster.dask_scheduler: no Dask scheduler answers at tcp://127.0.0.1:9 "):
        discover(*arguments(joblib_backend="dask", dask_scheduler="tcp://127.0.0.1:9"))


def test_dask_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match="pip install distributed"):
        discover(*arguments(joblib_backend="dask", dask_scheduler="tcp://127.0.0.1:9"))
