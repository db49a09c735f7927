"""A real Slurm on this machine: munged, slurmctld, and a slurmd for each of a few "nodes".

Every machine (the head and each node) is a set of Linux namespaces with a hostname, a process tree
and a /dev/shm of its own; files and network are the host's, so that each daemon has its own port on
127.0.0.1. Killing the first process of a tree kills the whole tree: a power cut. It needs root and
Debian's packages slurmctld, slurmd, slurm-client and munge; no systemd, cgroups or accounting.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare")
CONFIG = """\
ClusterName=test
SlurmctldHost=head(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
# A machine listens on the address of its own name, not on every address.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}
# No cgroups, no binding to cores, no accounting.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
# At once; a job in the partition urgent preempts (requeues) those in main.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SlurmdTimeout=30
KillWait=5
MinJobAge=86400
ReturnToService=2
NodeName=node[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 \
RealMemory=16000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""
UNSHARE = (
    "unshare", "--mount", "--propagation", "slave", "--uts", "--ipc", "--pid", "--fork",
    "--kill-child", "--mount-proc",
)  # fmt: skip
MACHINE = """\
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
eval "$3"
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None: there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return (
            f"{', '.join(lacking)} missing: "
            "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        )
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    probe = ["bash", "-ec", "hostname probe; mount -t tmpfs tmpfs /dev/shm"]
    done = subprocess.run([*UNSHARE, *probe], capture_output=True, text=True)
    return f"no namespaces of one's own: {done.stderr.strip()}" if done.returncode else None


class Cluster:
    """The cluster, from `start` to `stop`.

    Args:
        folder: of all its files; empty.
        nodes: how many.
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self._nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._machines: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start all machines; returns when nodes take jobs."""
        for name in ("munge", "state", "spool", "out"):
            (self.folder / name).mkdir(parents=True)
        names = " ".join(["head", *self._nodes])
        hosts = Path("/etc/hosts").read_text() + f"127.0.0.1 {names}\n"
        (self.folder / "hosts").write_text(hosts)
        port = _free_ports(len(self._nodes) + 1)
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                folder=self.folder, port=port, first=port + 1, last=port + len(self._nodes),
                nodes=len(self._nodes),
            )
        )  # fmt: skip
        self._boot("head", _HEAD.format(munge=self.folder / "munge"))
        for node in self._nodes:
            self.boot_node(node)
        self.wait(lambda: all(self._state(node) == "idle" for node in self._nodes), 30, "nodes")

    def boot_node(self, node: str) -> None:
        """Power a node on."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._boot(node, f"slurmd -D -N {node} & wait")

    def cut_node(self, node: str) -> None:
        """Power a node off, and let the controller know (it takes half a minute to notice)."""
        self._cut(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=cut")

    def stop(self) -> None:
        """Power everything off."""
        for name in list(self._machines):
            self._cut(name)

    def run(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            words, env=self.environment | dict(environment or {}), capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job_state(self, job: str) -> str:
        """Such as RUNNING or COMPLETED."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def restarts(self, job: str) -> int:
        """How often a job was requeued."""
        for word in self.run("scontrol", "show", "job", job).split():
            if word.startswith("Restarts="):
                return int(word.removeprefix("Restarts="))
        raise AssertionError("no Restarts= in scontrol show job")

    def wait(self, holds: Callable[[], object], seconds: float, what: str) -> None:
        """Until something holds."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{self._logs()}"
            time.sleep(0.1)

    def _state(self, node: str) -> str:
        with contextlib.suppress(AssertionError):  # the controller is not up yet
            return self.run("sinfo", "-hN", "-p", "main", "-n", node, "-o", "%T")
        return ""

    def _boot(self, name: str, command: str) -> None:
        with (self.folder / "out" / name).open("ab") as out:
            machine = ["bash", "-ec", MACHINE, "boot", name, str(self.folder / "hosts"), command]
            self._machines[name] = subprocess.Popen(
                [*UNSHARE, *machine],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def _cut(self, name: str) -> None:
        machine = self._machines.pop(name)
        children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()
        for pid in [*map(int, children), machine.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        machine.wait()

    def _logs(self) -> str:
        parts = []
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("out/*")]):
            tail = "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            parts.append(f"--- {path.name}\n{tail}")
        return "\n".join(parts)


_HEAD = """\
mungekey --create --force --keyfile={munge}/key
munged --force --foreground --key-file={munge}/key --socket={munge}/socket \
    --pid-file={munge}/pid --log-file={munge}/log --seed-file={munge}/seed --num-threads=2 &
until [ -S {munge}/socket ]; do sleep 0.05; done
slurmctld -D & wait
"""


def _free_ports(count: int) -> int:
    """The first of some adjoining ports that are free."""
    for first in range(26817, 32000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    listener = stack.enter_context(socket.socket())
                    listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")
