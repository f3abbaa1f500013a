# Configures what WriteLayer has unpacked; run by root in a machine that is made of it.
#
#   configure.sh ARCHITECTURE PACKAGE...   the packages that have a preinst, in apt's order
#
# All files are there before the first script runs, as debootstrap and mmdebstrap have it too.
# base-passwd comes first: by its preinst there are users, whom all others may name. mawk is awk
# to them by its postinst. A preinst of others runs before anything of theirs is configured.
set -e
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true LC_ALL=C.UTF-8 HOME=/root
export PATH=/run/configure/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
architecture=$1
shift
cd /
umask 022

# An emulator translates a program once for each address that it runs at. With one address for
# all of a program's processes they start in a third of the time.
[ ! -w /proc/sys/kernel/randomize_va_space ] || echo 0 >/proc/sys/kernel/randomize_va_space

# Of dpkg's database each change is written out to the disk, which nobody needs here.
mkdir -p /run/configure
mount -t tmpfs -o mode=755 tmpfs /run/configure
mkdir /run/configure/bin /run/configure/dpkg
cp -a /var/lib/dpkg/. /run/configure/dpkg/
mount --bind /run/configure/dpkg /var/lib/dpkg

# ca-certificates makes the bundle of certificates when it is configured, and once more by its
# trigger, for hooks, by a thousand processes each time. Where there is no hook, and neither the
# configuration nor a certificate is newer than the bundle, the second time would change nothing.
if [ -x /usr/sbin/update-ca-certificates ]; then
	cat >/run/configure/bin/update-ca-certificates <<-'END'
		#!/bin/sh
		made=/run/configure/certificates-made
		if [ $# = 0 ] && [ -e $made ] && [ -z "$(ls -A /etc/ca-certificates/update.d 2>&1)" ]; then
			newer=$(find /etc/ca-certificates.conf /usr/share/ca-certificates /usr/local/share/ca-certificates -newer $made 2>&1)
			[ -n "$newer" ] || exit 0
		fi
		rm -f $made
		touch $made.begun
		/usr/sbin/update-ca-certificates "$@" || exit
		mv $made.begun $made
	END
	chmod 755 /run/configure/bin/update-ca-certificates
fi

version=$(dpkg-query -W -f '${Version}' dpkg)
preinst() {
	for script in "/var/lib/dpkg/info/$1.preinst" "/var/lib/dpkg/info/$1:$architecture.preinst"; do
		[ ! -e "$script" ] || env DPKG_MAINTSCRIPT_PACKAGE="$1" DPKG_MAINTSCRIPT_NAME=preinst \
			DPKG_MAINTSCRIPT_ARCH="$architecture" DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1 \
			DPKG_RUNNING_VERSION="$version" DPKG_ADMINDIR=/var/lib/dpkg DPKG_ROOT= \
			"$script" install </dev/null || { echo "preinst of $1 ended with $?" >&2; exit 1; }
	done
}

preinst base-passwd
dpkg --force-depends --configure base-passwd base-files
[ ! -e /var/lib/dpkg/info/mawk.list ] || dpkg --force-depends --configure mawk
for package in "$@"; do
	[ "$package" = base-passwd ] || preinst "$package"
done
dpkg --configure --pending
left=$(dpkg --audit)
[ -z "$left" ] || { echo "$left" >&2; exit 1; }

umount /var/lib/dpkg
cp -a /run/configure/dpkg/. /var/lib/dpkg/
umount /run/configure
rmdir /run/configure

# What tells when and where the image was made, and what no two machines may share.
rm -f /var/lib/dpkg/*-old /var/cache/debconf/*-old /var/log/*.log /var/log/apt/* /var/cache/ldconfig/aux-cache \
	/etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub /var/lib/dbus/machine-id
[ ! -e /etc/machine-id ] || : >/etc/machine-id
