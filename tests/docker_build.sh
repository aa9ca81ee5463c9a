#!/usr/bin/env bash
# Build the image and use it as a stranger would: any user, read-only, no home, no network. Run once per release.
#
#   tests/docker_build.sh [STORE]        STORE: a scratch folder with 30 GB free; a new temporary one by default
#
# With a Docker engine it uses that. Without one it needs root on Debian and
#   apt-get install --no-install-recommends buildah podman runc debootstrap fuse-overlayfs
# and takes BASE_IMAGE, or bootstraps a Debian with Python as the base. BUILD_OPTIONS goes to the build as it is.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
store=${1:-$(mktemp -d)}
mkdir -p "$store"
cd "$store"
tag=localhost/histossl:check
say() { printf '\n== %s\n' "$*"; }

# ---- build

if docker info >/dev/null 2>&1; then
    engine=(docker)
    limits=()
    # shellcheck disable=SC2086
    docker build ${BASE_IMAGE:+--build-arg BASE_IMAGE="$BASE_IMAGE"} ${BUILD_OPTIONS:-} -t "$tag" "$here"
else
    place=(--root "$store/root" --runroot "$store/run" --storage-driver overlay)
    engine=(podman "${place[@]}" --cgroup-manager cgroupfs --runtime "$(command -v runc)")
    limits=(--ulimit nofile=20000:20000 --ulimit nproc=30000:30000)
    base=${BASE_IMAGE:-localhost/debian-python:check}
    if [ -z "${BASE_IMAGE:-}" ] && ! "${engine[@]}" image exists "$base"; then
        say "base: a bootstrapped Debian with Python"
        mirror=$(awk '/^URIs:/{print $2; exit}' /etc/apt/sources.list.d/debian.sources)
        codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
        [ -d rootfs ] || debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
            "$codename" rootfs "$mirror" >debootstrap.log
        tar -C rootfs --one-file-system -cf rootfs.tar .
        "${engine[@]}" import -q rootfs.tar "$base"
        rm -rf rootfs rootfs.tar
    fi
    # The build uses this machine's certificates; the image keeps nothing of them but two empty mount points.
    mkdir -p hostca
    cp -L "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" hostca/ca.crt
    printf '[global]\ncert = /hostca/ca.crt\n' >hostca/pip.conf
    # shellcheck disable=SC2086
    buildah "${place[@]}" bud --layers --pull-never --isolation chroot --network host --build-arg BASE_IMAGE="$base" \
        --volume "$store/hostca:/hostca:ro" --volume "$store/hostca/pip.conf:/etc/pip.conf:ro" ${BUILD_OPTIONS:-} \
        -t "$tag" -f "$here/Dockerfile" "$here"
fi
run() { "${engine[@]}" run --rm "${limits[@]}" --network none "$@"; }

# ---- use

say "size and user"
"${engine[@]}" images --format '{{.Repository}}:{{.Tag}} {{.Size}}' | grep check
[ "$(run --entrypoint id "$tag" -u)" != 0 ] || { echo "the image runs as root" >&2; exit 1; }

say "help and version"
run "$tag" --version
run "$tag" >help.txt
grep -q pretrain help.txt

say "a demo as a user without a name, on a read-only image, without network"
rm -rf work && mkdir work && chmod 1777 work
run --user 1234:1234 --read-only --tmpfs /tmp:mode=1777 --shm-size 1g -v "$store/work:/workspace" "$tag" \
    demo --slides 12 --steps 4 --output /workspace/demo
report=$(find work -name report.html)
[ -s "$report" ] || { echo "no report.html" >&2; exit 1; }
[ "$(stat -c %u:%g "$report")" = 1234:1234 ] || { echo "the report belongs to $(stat -c %u:%g "$report")" >&2; exit 1; }

say "the same workspace again, home unset: it goes on and repeats nothing"
run --user 1234:1234 --read-only --tmpfs /tmp:mode=1777 --shm-size 1g -v "$store/work:/workspace" \
    --entrypoint env "$tag" -u HOME -u USER histossl demo --slides 12 --steps 4 --output /workspace/demo

say "the default user with a fresh volume of its own"
run --shm-size 1g "$tag" demo --only-paint /workspace/painted --slides 6

say "a user's mistake is one clear line, exit 2"
code=0
run "$tag" tile --slides /nowhere 2>err.txt || code=$?
cat err.txt
[ "$code" = 2 ] && [ "$(grep -c . err.txt)" = 1 ] || { echo "exit $code" >&2; exit 1; }

say "all of it worked; the image is $tag, everything else lies in $store"
