"""A real SLURM cluster on this machine: munged, slurmctld and one slurmd a node, from Debian's packages, without systemd.

Every node lives in its own UTS and mount namespace (its own hostname and /etc/hosts) on its own loopback address, so that
torch's rendezvous by hostname works as between machines. GPUs are links to /dev/null: SLURM counts and hands them out, and
the training code, which finds no CUDA, runs on CPUs over gloo.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
NODES, GPUS, CPUS = 16, 8, 96
PATIENCE = 600
"""Seconds until a test gives up waiting. A job's start takes 10 s on two free cores and has taken ten times that within the suite."""

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default: 120 s, which smaller values than 5 give too)
AuthInfo=socket={path}/munge.sock,cred_expire=5
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool/%n
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/%n.pid
SlurmctldLogFile={path}/slurmctld.log
SlurmdLogFile={path}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=10
KillWait=3
EnforcePartLimits=ALL
MinJobAge=86400
# Ports of ranks follow from the job's number: two clusters on one machine must not count alike.
FirstJobId={job}
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=node[01-{nodes:02d}] NodeAddr=127.0.1.[1-{nodes}] Port=[{first}-{last}] CPUs={cpus} Sockets=2 CoresPerSocket={cores} \
ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:h100:{gpus} Feature=h100 State=UNKNOWN
PartitionName=h100 Nodes=ALL Default=YES MaxTime=7-0 PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL MaxTime=7-0 PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    absent = [program for program in PROGRAMS if not shutil.which(program)]
    if absent:
        return f"no SLURM here ({', '.join(absent)} missing); apt-get install slurmctld slurmd slurm-client munge"
    if os.getuid() != 0:
        return "starting a SLURM cluster on one machine needs root"
    node = "hostname probe && mount --bind /etc/hosts /etc/hosts"
    probe = subprocess.run(["unshare", "--uts", "--mount", "sh", "-c", node], capture_output=True, text=True)
    return "" if probe.returncode == 0 else f"namespaces, which stand for nodes, cannot be made here ({probe.stderr.strip()})"


class Cluster:
    """start() ... stop(). `environment` is what commands on the login node need."""

    def __init__(self, path: Path):
        self.path = path
        self.environment = {**os.environ, "SLURM_CONF": str(path / "slurm.conf")}
        for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID"):
            self.environment.pop(name, None)

    @staticmethod
    def node(number: int) -> str:
        return f"node{number:02d}"

    def start(self) -> None:
        for folder in ("state", "dev", *(f"spool/{self.node(n)}" for n in range(1, NODES + 1))):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        for gpu in range(GPUS):
            (self.path / f"dev/gpu{gpu}").symlink_to("/dev/null")
        port = _free_ports(NODES + 1)
        values = {
            "host": socket.gethostname(),
            "path": self.path,
            "port": port,
            "first": port + 1,
            "last": port + NODES,
            "job": 1 + os.getpid() % 2000,
        }
        configuration = CONFIGURATION.format(**values, nodes=NODES, cpus=CPUS, cores=CPUS // 2, gpus=GPUS)
        (self.path / "slurm.conf").write_text(configuration)
        (self.path / "gres.conf").write_text(f"AutoDetect=off\nName=gpu Type=h100 File={self.path}/dev/gpu[0-{GPUS - 1}]\n")
        (self.path / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # named, not used: searching for one ends slurmd
        hosts = [f"127.0.0.1 localhost {socket.gethostname()}", *(f"127.0.1.{n} {self.node(n)}" for n in range(1, NODES + 1))]
        (self.path / "hosts").write_text("\n".join(hosts) + "\n")
        key = self.path / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"key-file": key, "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        self._run("munged", "--force", "--origin=127.0.0.1", *(f"--{name}={self.path / file}" for name, file in files.items()))
        self._run("slurmctld", "-f", str(self.path / "slurm.conf"))
        for number in range(1, NODES + 1):
            self.power_on(self.node(number))
        self.wait(lambda: len(self.idle()) == NODES, "all nodes idle")

    def stop(self) -> None:
        """End every process of the cluster: jobs, nodes, daemons. Nothing is left to the next one."""
        with contextlib.suppress(subprocess.SubprocessError):
            self._run("scancel", "--full", "--user", "root", timeout=10)
            self.wait(lambda: not self.output("squeue", "-h", "-o", "%i"), "no job left", 20)
        for number in range(1, NODES + 1):
            self.power_off(self.node(number), mark=False)
        for daemon in ("slurmctld", "munged"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.kill(int((self.path / f"{daemon}.pid").read_text()), signal.SIGKILL)

    def power_on(self, node: str) -> None:
        script = f"hostname {node} && mount --bind '{self.path}/hosts' /etc/hosts && exec slurmd -N {node}"
        self._run("unshare", "--uts", "--mount", "sh", "-c", script)

    def power_off(self, node: str, *, mark: bool = True) -> None:
        """SIGKILL to every process in the node's namespace. mark: tell the controller, which would else take SlurmdTimeout."""
        try:
            name = os.readlink(f"/proc/{int((self.path / f'{node}.pid').read_text())}/ns/uts")
        except (FileNotFoundError, ValueError):
            return
        assert name != os.readlink("/proc/self/ns/uts")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns/uts") == name:
                    os.kill(int(process.name), signal.SIGKILL)
        (self.path / f"{node}.pid").unlink(missing_ok=True)
        if mark:
            self._run("scontrol", "update", f"nodename={node}", "state=down", "reason=power")

    def processes(self, node: str, pattern: str) -> list[int]:
        """Processes on a node whose command line begins with `pattern`, a regular expression."""
        if not self.is_on(node):
            return []
        name = os.readlink(f"/proc/{int((self.path / f'{node}.pid').read_text())}/ns/uts")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if os.readlink(process / "ns/uts") == name and re.match(pattern, command):
                    found.append(int(process.name))
        return sorted(found)

    def is_on(self, node: str) -> bool:
        return (self.path / f"{node}.pid").exists()

    def idle(self) -> list[str]:
        return sorted(set(self.output("sinfo", "-h", "-N", "-p", "h100", "-t", "idle", "-o", "%N").split()))

    def output(self, *command: str) -> str:
        return self._run(*command).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job` as a mapping: JobState, Restarts, BatchHost, NodeList, ..."""
        shown = self.output("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"after {seconds} s still not: {what}\n{busiest()}"
            time.sleep(0.2)

    def _run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess:
        # Daemons keep what they inherit: a pipe of ours would never end.
        daemon = command[0] in ("munged", "slurmctld", "unshare")
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} if daemon else {"capture_output": True, "text": True}
        return subprocess.run(command, env=self.environment, check=True, timeout=timeout, stdin=subprocess.DEVNULL, **streams)


def busiest() -> str:
    """What keeps this machine busy, so that a slow one can be told from a job that hangs."""
    processes = subprocess.run(["ps", "-eo", "pcpu,etimes,args", "--sort=-pcpu"], capture_output=True, text=True).stdout
    return "\n".join([f"load {os.getloadavg()}", *(line[:160] for line in processes.splitlines()[:12])])


def _free_ports(count: int) -> int:
    """First of `count` ports in a row that are free now."""
    for first in range(21000 + os.getpid() % 500 * 20, 32000, count):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")
