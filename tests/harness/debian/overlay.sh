# Makes one file system of several folders, in a mount namespace of its own.
#
#   sh overlay.sh PLACE LAYER...
#
# PLACE is an empty folder; the system is in PLACE/root then. The uppermost layer comes first. None of them is written
# to: what is changed is in memory, in PLACE/upper.
set -eu
place=$1
shift

mount -t tmpfs -o mode=0755 tmpfs "$place"
cd "$place"
mkdir upper work root layers
lower=
for layer in "$@"; do # by other names, since in the option a colon separates and a comma ends
    mkdir "layers/$#"
    mount --bind "$layer" "layers/$#"
    lower=${lower:+$lower:}layers/$#
    shift
done
mount -t overlay -o "lowerdir=$lower,upperdir=upper,workdir=work" overlay root
