"""Two hosts, which are two network namespaces: a rank is killed, the job restarts and ends."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from runs import arguments, finish, start, state_of, write_images

from quadmamba.utils.launch import Place
from quadmamba.utils.meeting import Wait, fresh_part

HOSTS = {"quad0": "10.77.3.1", "quad1": "10.77.3.2"}
PORT = 29511


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("before", [2, 3])
def test_each_start_gets_a_part_of_its_own_in_a_store_that_stays(before):
    store = dist.HashStore()

    def meet(size):
        def join(rank):
            time.sleep(0 if rank else 0.2)  # the others meet the offer of the start before
            return fresh_part(store, Place(rank=rank, size=size), Wait(10))

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(join, range(size)))

    for part in meet(before):
        part.set("address", "of a process that died")
    parts = meet(2)
    assert not parts[0].check(["address"])
    parts[0].set("address", "here")
    assert parts[1].get("address") == b"here"


@pytest.fixture
def hosts():
    """Two namespaces with a wire between them; skips where this user may not make any."""
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("needs root and iproute2 to make network namespaces")
    names = list(HOSTS)
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"may not make network namespaces: {error.stderr}")
    try:
        ip(*f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}".split())
        for name, address in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            for pid in ip("netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            ip("netns", "del", name)


def test_a_rank_killed_on_one_of_two_hosts_restarts_the_job(hosts, tmp_path):
    data = write_images(tmp_path / "data", train=20, val=5)
    words = arguments(
        *("--data-path", data, "--output", tmp_path, "--batch-size", 2, "--epochs", 3),
        TRAIN__SAVE_MINUTES=1e-6,
    )
    faults = ["kill=8", "rank=3", f"once={tmp_path / 'killed'}", "settle=1"]
    agents = []
    for host, is_host in zip(hosts, ("true", "false")):
        launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
        launch += ["--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=survive"]
        launch += [f"--rdzv-endpoint={HOSTS['quad0']}:{PORT}", f"--rdzv-conf=is_host={is_host}"]
        launch += [f"--local-addr={HOSTS[host]}", "tests/faulty.py", *faults, "--", *words]
        inside = ("ip", "netns", "exec", host)
        agents.append(start(launch, inside=inside, GLOO_SOCKET_IFNAME="eth0"))
    ends = [finish(agent, timeout=200) for agent in agents]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert (tmp_path / "killed").exists()
    text = "".join(out + err for _, out, err in ends)
    assert "failed (exitcode: -9) local_rank: 1" in text
    assert "images of the next" in text
    saved = state_of(tmp_path)
    assert (saved["epoch"], saved["updates"], saved["layout"]["ranks"]) == (3, 15, 4)
    log = (tmp_path / "quadmamba_lite/default/log.jsonl").read_text().splitlines()
    kinds = [entry["kind"] for entry in map(json.loads, log)]
    assert kinds.count("resume") == 1
