#!/usr/bin/env bash
# A real Slurm of two nodes on one machine, in the foreground. Runs as process 1 of a pid namespace, so that all of it
# ends when this ends. BASE/ready appears when both nodes are idle. USR1 powers n1 on again, USR2 n2.
#   cluster.sh BASE PORT PORT PORT      BASE and its parents must be readable by all, or munged refuses its socket
set -eu
base=$1
here=$(cd "$(dirname "$0")" && pwd)
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$base/etc/slurm.conf
mkdir -p "$base"/{etc,munge,state,spool,log}
chmod 755 "$base/munge"
(umask 077 && head -c 128 /dev/urandom > "$base/munge/key")
cat > "$base/etc/hosts" << END
127.0.0.1 localhost
127.0.77.10 ctl
127.0.77.11 n1
127.0.77.12 n2
END
# The other plugin wants a cgroup hierarchy, which a container may lack.
echo CgroupPlugin=cgroup/v1 > "$base/etc/cgroup.conf"
# cred_expire: a requeued job waits until its credential has expired, by default two minutes.
cat > "$base/etc/slurm.conf" << END
ClusterName=test
SlurmctldHost=ctl(127.0.77.10)
SlurmctldPort=$2
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$base/munge/socket,cred_expire=5
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
SlurmctldPidFile=$base/log/slurmctld.pid
SlurmdPidFile=$base/log/slurmd.%n.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=10
MinJobAge=3600
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
NodeName=n1 NodeHostname=n1 NodeAddr=127.0.77.11 Port=$3 CPUs=8 State=UNKNOWN
NodeName=n2 NodeHostname=n2 NodeAddr=127.0.77.12 Port=$4 CPUs=8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END

munged -F --key-file="$base/munge/key" --socket="$base/munge/socket" --pid-file="$base/munge/pid" \
  --log-file="$base/munge/log" --seed-file="$base/munge/seed" > "$base/log/munged.out" 2>&1 &
until [ -S "$base/munge/socket" ]; do sleep 0.05; done
unshare --mount --uts sh -c "hostname ctl; mount --bind $base/etc/hosts /etc/hosts; exec slurmctld -D" \
  > "$base/log/slurmctld.out" 2>&1 &
power_on() {
  unshare --mount --uts --pid --fork --mount-proc --kill-child bash "$here/node.sh" "$base" "$1" \
    >> "$base/log/$1.out" 2>&1 &
  echo $! > "$base/log/$1.pid"
}
power_on n1
power_on n2
trap 'power_on n1' USR1
trap 'power_on n2' USR2
until [ "$(sinfo --noheader --format '%t %D' 2> /dev/null)" = "idle 2" ]; do sleep 0.05; done
touch "$base/ready"
while :; do wait || true; done
