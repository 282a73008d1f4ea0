# The first process of a container, in namespaces of its own: makes its file system and becomes its systemd.
#
#   sh boot.sh FOLDER CONSOLE OVERLAY LAYER...       < ARCHIVE
#
# As systemd's container interface wants it (its docs/CONTAINER_INTERFACE.md), and systemd-nspawn does it.
set -eu
folder=$1 console=$2 overlay=$3
shift 3

mkdir "$folder/top"
sh "$overlay" "$folder/top" "$@"
cd "$folder/top/root"

mount -t proc -o nosuid,nodev,noexec proc proc
for path in proc/sys proc/sysrq-trigger; do # of the whole machine
    [ -e $path ] || continue
    mount --bind $path $path
    mount -o remount,bind,ro $path
done
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=0755,nosuid tmpfs dev
mknod -m 0666 dev/null c 1 3
mknod -m 0666 dev/zero c 1 5
mknod -m 0666 dev/full c 1 7
mknod -m 0666 dev/random c 1 8
mknod -m 0666 dev/urandom c 1 9
mknod -m 0666 dev/tty c 5 0
mkdir dev/pts
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5,nosuid,noexec devpts dev/pts
ln -s pts/ptmx dev/ptmx
touch dev/console
mount --bind "$console" dev/console
mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs run
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs tmp
mkdir run/host
touch run/host/agent
mount --bind "$folder/agent" run/host/agent
tar -x --no-same-owner

hostname container
pivot_root . .
umount -l .
cd /
# of a container, systemd leaves this to its manager; what is mounted later is to be seen in each service's namespace
mount --make-rshared /

# What systemd-nspawn leaves a container with a network of its own: nothing that changes the machine's kernel.
capabilities=-all
for name in audit_control audit_write chown dac_override dac_read_search fowner fsetid ipc_owner kill lease \
    linux_immutable mknod net_admin net_bind_service net_broadcast net_raw setfcap setgid setpcap setuid sys_admin \
    sys_boot sys_chroot sys_nice sys_ptrace sys_resource sys_tty_config; do
    capabilities=$capabilities,+$name
done
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin container=gpuswitch \
    setpriv --bounding-set $capabilities /sbin/init </dev/null >/dev/console 2>&1
