#!/bin/sh
# The first process of a guest of `cargo xtask kernels`: makes the kernel ready, runs the tests, tells how it went.
# What begins with @kernels is for xtask, which reads the console; the settings come from it.

say() { echo "@kernels $*"; }

mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mount -t tmpfs none /run
mount -t tmpfs none /tmp
mount -t cgroup2 none /sys/fs/cgroup
mount -t bpf none /sys/fs/bpf
. /settings
for module in /modules/*.ko; do
    insmod "$module" || say broken "the kernel does not take $module"
done
ip link set lo up
# An agent is called as its node, which is called so.
echo guest >/proc/sys/kernel/hostname
say booted "$(uname -rv)"

timeout -s KILL "$DOCTOR_SECONDS" mesh-agent doctor -o json >/tmp/doctor 2>/dev/null
while IFS= read -r line; do say doctor "$line"; done </tmp/doctor

say tests
timeout -s KILL "$TESTS_SECONDS" kernel-tests "$@" 2>&1
say exit $?
[ -f "$MESH_TESTS_RECORD" ] && while IFS= read -r line; do say record "$line"; done <"$MESH_TESTS_RECORD"
say end
reboot -f
