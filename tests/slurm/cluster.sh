#!/usr/bin/env bash
# A real SLURM cluster of three nodes on this machine, for tests: cluster.sh install | up FOLDER | down FOLDER | kill FOLDER NODE
# Each node is a slurmd in a network namespace of its own, with its own address and host name; where namespaces are not
# allowed, a slurmd on a port of its own. `up` needs root and Debian's slurm-wlm; one cluster at a time. It ends with the
# process STS_CLUSTER_OWNER, however that ends. No systemd, no accounting. Tried with SLURM 22.05.
set -euo pipefail

NODES=3
CPUS=8 # advertised, whatever the machine has
GPUS=2 # advertised, plain files
NET=10.199.7
BRIDGE=stsbr0
self=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)/$(basename "${BASH_SOURCE[0]}")

install() { # says why if it cannot be
  if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && command -v sbatch >/dev/null; then return 0; fi
  [ "$(id -u)" = 0 ] || { echo "installing SLURM needs root" >&2; return 1; }
  command -v apt-get >/dev/null || { echo "SLURM is installed with apt-get only, which is not here" >&2; return 1; }
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge iproute2; } >/dev/null 2>&1 || { echo "apt-get could not install slurmctld slurmd slurm-client munge" >&2; return 1; }
}

may_have_namespaces() {
  ip netns add sts-probe 2>/dev/null && ip netns del sts-probe && ip link add sts-probe type veth peer name sts-probe2 2>/dev/null && ip link del sts-probe
}

strip_hosts() { sed '/# BEGIN sts-slurm/,/# END sts-slurm/d' /etc/hosts >"$base/hosts.before" && cat "$base/hosts.before" >/etc/hosts; }

networks() {
  ip link add $BRIDGE type bridge
  ip addr add $NET.254/24 dev $BRIDGE
  ip link set $BRIDGE up
  for i in $(seq $NODES); do
    ip netns add "sts-node$i"
    ip link add "stsv$i" type veth peer name eth0 netns "sts-node$i"
    ip link set "stsv$i" master $BRIDGE up
    ip -n "sts-node$i" addr add "$NET.$i/24" dev eth0
    ip -n "sts-node$i" link set lo up
    ip -n "sts-node$i" link set eth0 up
    ip -n "sts-node$i" route add default via $NET.254
  done
}

hosts() { # the controller and every node know all names; no resolver is asked, which would wait
  local i
  { echo "127.0.0.1 localhost"; echo "$controller $(hostname -s)"
    for i in $(seq $NODES); do
      if [ "$mode" = netns ]; then printf '%s node%s\n' "$NET.$i" "$i"; else printf '127.0.0.1 node%s\n' "$i"; fi
    done; } >"$base/etc/hosts"
  sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$base/etc/nsswitch.conf"
  strip_hosts
  { echo "# BEGIN sts-slurm"; tail -n +3 "$base/etc/hosts"; echo "# END sts-slurm"; } >>/etc/hosts
}

configure() {
  local i memory
  memory=$(awk '/MemTotal/{print int($2/1024*0.9)}' /proc/meminfo)
  for i in $(seq 0 $((GPUS - 1))); do mknod -m 666 "$base/dev/gpu$i" c 1 3; done
  cat >"$base/etc/slurm.conf" <<CONF
ClusterName=sts
SlurmctldHost=$(hostname -s)($controller)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$base/munge/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=17817
SlurmctldPidFile=$base/run/slurmctld.pid
SlurmdPidFile=$base/run/slurmd-%n.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd-%n.log
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0,requeue_setup_env_fail
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
KillWait=${STS_KILL_WAIT:-30}
MinJobAge=3600
PrologFlags=Alloc
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PartitionName=train Nodes=node[1-$NODES] Default=YES MaxTime=INFINITE State=UP
CONF
  for i in $(seq $NODES); do
    if [ "$mode" = netns ]; then echo "NodeName=node$i NodeHostname=node$i NodeAddr=$NET.$i Port=17818 CPUs=$CPUS RealMemory=$memory Gres=gpu:$GPUS State=UNKNOWN"
    else echo "NodeName=node$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((17900 + i)) CPUs=$CPUS RealMemory=$memory Gres=gpu:$GPUS State=UNKNOWN"; fi
  done >>"$base/etc/slurm.conf"
  echo "NodeName=node[1-$NODES] Name=gpu File=$base/dev/gpu[0-$((GPUS - 1))]" >"$base/etc/gres.conf"
  printf 'CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n' >"$base/etc/cgroup.conf"
}

start_node() {
  mkdir -p "$base/spool/$1"
  if [ "$mode" = netns ]; then
    # nsenter, not `ip netns exec`: that mounts a /sys without cgroups, of which slurmd 22.05 dies.
    nsenter --net="/run/netns/sts-$1" unshare -u -m bash -c "hostname $1; mount --bind '$base/etc/hosts' /etc/hosts; mount --bind '$base/etc/nsswitch.conf' /etc/nsswitch.conf; exec slurmd -N $1" 9>&-
  else
    slurmd -N "$1" 9>&-
  fi
}

processes_of() { # of a node: its slurmd, and whatever that started
  if [ "$mode" = netns ]; then ip netns pids "sts-$1" 2>/dev/null || true; return; fi
  cat "$base/run/slurmd-$1.pid" 2>/dev/null || true
  local path
  for path in /proc/[0-9]*; do
    if { tr '\0' '\n' <"$path/environ"; } 2>/dev/null | grep -cxF -e "SLURMD_NODENAME=$1" -e "SLURM_CONF=$base/etc/slurm.conf" | grep -qx 2; then echo "${path#/proc/}"; fi
  done
}

stop() { # by a file that holds its process id
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  kill -TERM "$pid" 2>/dev/null || return 0
  for _ in $(seq 20); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
  kill -KILL "$pid" 2>/dev/null || true
}

up() {
  exec 9>/tmp/sts-slurm.lock
  flock 9 # another cluster's end
  mkdir -p "$base"/{etc,log,run,state,spool,dev,munge}
  chmod 755 "$base" "$base"/{etc,run,munge}
  if may_have_namespaces; then mode=netns controller=$NET.254; else mode=local controller=127.0.0.1; fi
  echo "$mode" >"$base/mode"
  (umask 077; dd if=/dev/urandom of="$base/munge/munge.key" bs=1024 count=1 status=none)
  munged --force --key-file="$base/munge/munge.key" --socket="$base/munge/munge.socket" --pid-file="$base/run/munged.pid" \
    --log-file="$base/log/munged.log" --seed-file="$base/munge/munge.seed" --num-threads=2 9>&-
  # The lock is held, and all of this ended, by a process that outlives us and the tests' end.
  setsid bash "$self" keep "$base" "${STS_CLUSTER_OWNER:-$PPID}" </dev/null >"$base/log/keep.log" 2>&1 &
  if [ "$mode" = netns ]; then networks; fi
  hosts
  configure
  slurmctld -c 9>&-
  for i in $(seq $NODES); do start_node "node$i"; done
  for _ in $(seq 150); do
    if [ "$(sinfo -h -N -o %T 2>/dev/null | grep -c '^idle$')" = $NODES ]; then echo "$mode"; return 0; fi
    sleep 0.2
  done
  echo "the nodes did not come up; see $base/log" >&2
  return 1
}

keep() { # inherits the lock
  while kill -0 "$2" 2>/dev/null && [ -e "$base/mode" ]; do sleep 0.5; done
  down
}

down() {
  mode=$(cat "$base/mode" 2>/dev/null) || return 0
  stop "$base/run/slurmctld.pid"
  local node pid
  for node in $(seq -f 'node%g' $NODES); do
    for pid in $(processes_of "$node"); do kill -KILL "$pid" 2>/dev/null || true; done
    if [ "$mode" = netns ]; then ip netns del "sts-$node" 2>/dev/null || true; ip link del "stsv${node#node}" 2>/dev/null || true; fi
  done
  stop "$base/run/munged.pid"
  if [ "$mode" = netns ]; then ip link del $BRIDGE 2>/dev/null || true; fi
  strip_hosts
  rm -f "$base/mode" # last: the lock is let go, and the next cluster comes
}

action=${1:?install, up, down or kill}
if [ "$action" = install ]; then install; exit; fi
base=${2:?a folder}
export SLURM_CONF=$base/etc/slurm.conf
case $action in
  up) up ;;
  keep) shift; keep "$@" ;;
  down) down ;;
  kill) mode=$(cat "$base/mode"); for pid in $(processes_of "$3"); do kill -KILL "$pid" 2>/dev/null || true; done ;;
  *) echo "no such action: $action" >&2; exit 2 ;;
esac
