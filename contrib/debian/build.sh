#!/bin/sh
# Makes the Debian package for the release that it runs on: `make deb`. It is in dist/ then.
#
# Python's libraries are the distribution's own where they are new enough, from Debian 14 on; else wheels come along,
# those that contrib/requirements.lock names by hash. pip obeys its environment (PIP_NO_INDEX, PIP_FIND_LINKS ...).
set -eu

source=$(cd "$(dirname "$0")/../.." && pwd)
die() { printf '%s\n' "cannot make the package: $*" >&2; exit 1; }

command -v dpkg-query >/dev/null || die "this is no Debian; docs/packages.md says what there is for others"
# shellcheck source=/dev/null
. /etc/os-release
release=${VERSION_CODENAME:?}
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$source/gpuswitch/__init__.py")
PYTHON=/usr/bin/python3

case $release in
bookworm | trixie)
    architecture=any build_depends='python3, python3-venv' depends="\${bundled:Depends}, \${shlibs:Depends}"
    version=$version~deb$VERSION_ID # an upgrade of Debian brings the package of the next one
    overrides=contrib/debian/bundled.lintian-overrides
    ;;
*)
    architecture=all build_depends='dh-python, pybuild-plugin-pyproject, python3-all, python3-hatchling'
    depends="\${python3:Depends}"
    ;;
esac

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
trap 'exit 1' HUP INT TERM
mkdir "$tree/gpuswitch"
cd "$source"
cp -a --parents pyproject.toml README.md CHANGELOG.md CONTRIBUTING.md LICENSE gpuswitch units contrib docs "$tree/gpuswitch"
# The page for Cockpit, where `make cockpit` has built it: npm's packages are no package of Debian's, and nothing is
# downloaded later.
page=dist/cockpit/gpuswitch
if [ -e $page/manifest.json ]; then
    sha256sum --check --status $page/.sources 2>/dev/null ||
        die "$page was built from other sources than are here; run 'make cockpit', or remove it"
    cp -a --parents $page "$tree/gpuswitch"
    overrides="${overrides:-} contrib/debian/page.lintian-overrides"
fi
cd "$tree/gpuswitch"
find . -name __pycache__ -type d -prune -exec rm -rf {} +
cp -a contrib/debian debian
rm debian/build.sh debian/program.sh debian/control.in debian/*.lintian-overrides
# shellcheck disable=SC2086 # one word for each file
[ -z "${overrides:-}" ] || cat $overrides >debian/gpuswitch.lintian-overrides
sed "s/@ARCHITECTURE@/$architecture/; s/@BUILD_DEPENDS@/$build_depends/; s/@DEPENDS@/$depends/" \
    contrib/debian/control.in >debian/control
cat >debian/changelog <<END
gpuswitch ($version) $release; urgency=medium

  * What changes for users is in /usr/share/doc/gpuswitch/CHANGELOG.md.gz.

 -- gpuswitch maintainers <maintainers@gpuswitch.invalid>  $(date -R ${SOURCE_DATE_EPOCH:+-d "@$SOURCE_DATE_EPOCH"})
END

command -v dpkg-checkbuilddeps >/dev/null || packages=dpkg-dev
if [ -n "${packages:-}" ] || ! dpkg-checkbuilddeps -I 2>/dev/null; then
    packages=dpkg-dev\ debhelper\ $(echo "$build_depends" | tr -d ,)
    [ "$(id -u)" -eq 0 ] || die "packages are missing; run: sudo apt-get install --no-install-recommends $packages"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q -o DPkg::Lock::Timeout=300 update
    # shellcheck disable=SC2086 # one word for each package
    apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends $packages
fi

if [ "$architecture" = any ]; then
    $PYTHON -m venv "$tree/tools"
    "$tree/tools/bin/pip" --quiet --disable-pip-version-check download --require-hashes --only-binary :all: \
        --dest debian/wheels --requirement contrib/requirements.lock
fi
# -d: a compiler, which it takes for granted (-I), has nothing to do here
dpkg-buildpackage -d -b -us -uc
mkdir -p "$source/dist"
cp -- ../gpuswitch_* "$source/dist"
cd ..
for package in gpuswitch_*.deb; do
    echo "made; to install it: apt-get install ./dist/$package"
done
