#!/usr/bin/env bash
# The AVX-512 rows on a CPU without AVX-512: Bochs emulates a PC with one, on which Linux starts the programs that
# neon.sh runs under qemu, whose emulation ends at AVX2. Needs g++ and Debian's bochs, bochs-term, isolinux, xorriso and
# cpio, and LINUX, a kernel for PCs (of a linux-image package), and root for a device file. A second in there takes one
# to three minutes.
#
#   LINUX=vmlinuz tests/cpp/avx512.sh [SECONDS [STRIDE]]     2 s, as Linux counts them, and every 1,000,003rd float
#
# Works in OUT (build/avx512); FUZZ_CXXFLAGS last. Clocks in there tell nothing of real ones.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-$PWD/build/avx512}
linux=$(realpath "${LINUX:?the path of a kernel for PCs}")
syslinux=/usr/lib/syslinux/modules/bios isolinux=/usr/lib/ISOLINUX/isolinux.bin
rm -rf "$out"/{root,cd,console}
mkdir -p "$out"/root/dev "$out"/cd/isolinux

objects=()
for source in csrc/cpu/kernels*.cpp tests/cpp/{fuzz_rows,tanh_sweep}.cpp; do
  object="$out/$(basename "$source" .cpp).o"
  g++ -std=c++20 -O2 -ffp-contract=off -fno-math-errno -fno-trapping-math -w -Wno-psabi -Icsrc \
    "-DBHYT_FUZZ_SECONDS=${1:-2}" -DBHYT_FUZZ_BOCHS ${FUZZ_CXXFLAGS:-} -c "$source" -o "$object"
  [[ $source == csrc/* ]] && objects+=("$object")
done
for main in fuzz_rows tanh_sweep; do
  g++ -static "$out/$main.o" "${objects[@]}" -o "$out/root/$main" -pthread
done

# The first process: runs both, says how they ended, turns the machine off by a restart.
cat > "$out/init.c" << END
#include <stdio.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <unistd.h>
static int run(char** command) {
  int status = 1;
  const pid_t child = fork();
  if (child == 0) return execv(command[0], command);
  waitpid(child, &status, 0);
  return status;
}
int main(void) {
  char* sweep[] = {"/tanh_sweep", "${2:-1000003}", "avx512", 0};
  char* fuzz[] = {"/fuzz_rows", 0};
  const int swept = run(sweep), fuzzed = run(fuzz);
  puts(swept == 0 && fuzzed == 0 ? "all good" : "failed");
  fflush(stdout);
  sleep(2);
  return reboot(RB_AUTOBOOT);
}
END
gcc -O1 -static "$out/init.c" -o "$out/root/init"
mknod "$out/root/dev/console" c 5 1
(cd "$out/root" && find . | cpio -o -H newc --quiet) > "$out/cd/initrd"
cp "$linux" "$out/cd/vmlinuz"
cp "$isolinux" "$syslinux/ldlinux.c32" "$out/cd/isolinux"
# Without compacted states, whose size Bochs and Linux count differently.
cat > "$out/cd/isolinux/isolinux.cfg" << END
DEFAULT linux
LABEL linux
  KERNEL /vmlinuz
  APPEND initrd=/initrd console=ttyS0 rdinit=/init quiet acpi=off mitigations=off reboot=t clearcpuid=xsaves,xsavec,pku
END
xorriso -as mkisofs -quiet -o "$out/cd.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot \
  -boot-load-size 4 -boot-info-table "$out/cd"

cat > "$out/bochsrc" << END
display_library: term
cpu: model=corei7_skylake_x, count=1, ips=30000000, reset_on_triple_fault=0
clock: sync=none
memory: guest=512, host=512
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
ata0: enabled=1
ata0-master: type=cdrom, path=$out/cd.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$out/console
sound: waveoutdrv=dummy
speaker: enabled=0
log: $out/log
panic: action=fatal
END
echo c > "$out/commands"  # Debian's is built with the debugger: go on
TERM=xterm timeout 1h script -qec "bochs -q -f $out/bochsrc -rc $out/commands" /dev/null \
  > "$out/screen" < /dev/null || true
grep -aE '^(avx512|[0-9]+ calls|all good|failed)' "$out/console"
grep -aq '^all good' "$out/console"
