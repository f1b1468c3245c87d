#!/usr/bin/env bash
# Copies this repository to every worker and installs it there.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

COMMIT=""
PYTHON=3.12

usage() {
  cat <<EOF
Usage: setup.sh --name NAME --zone ZONE [options]

Copies one commit of this repository to ~/$REMOTE_REPOSITORY on every worker and installs it with JAX for TPUs
into ~/$REMOTE_ENVIRONMENT. Run it again after a change: the files are replaced, ~/$REMOTE_REPOSITORY/runs stays.

  --commit COMMIT    what to copy; by default HEAD, if the working tree has no uncommitted changes
  --python VERSION   Python to install on the workers (default $PYTHON)
$COMMON_OPTIONS
EOF
}

own_option() {
  case $1 in
    --commit) COMMIT=$(value_of "${@:1:2}"); CONSUMED=2 ;;
    --python) PYTHON=$(value_of "${@:1:2}"); CONSUMED=2 ;;
  esac
}

parse_options "$@"
no_arguments
[[ $PYTHON =~ ^3\.[0-9]+$ ]] || die "--python '$PYTHON': a version such as 3.12"
repository=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel) ||
  die "this folder is in no git repository: what is copied is a commit"
if [[ -z $COMMIT ]]; then
  [[ -z $(git -C "$repository" status --porcelain) ]] ||
    die "there are uncommitted changes; commit them, or send the last commit without them: --commit HEAD"
  COMMIT=HEAD
fi
commit=$(git -C "$repository" rev-parse --verify --quiet "$COMMIT^{commit}") ||
  die "--commit '$COMMIT' is no commit of $repository"

staging=$(mktemp -d)
trap 'rm -rf "$staging"' EXIT
archive=$REMOTE_REPOSITORY.tar.gz
run git -C "$repository" archive --format=tar.gz --output="$staging/$archive" "$commit"
tpus tpu-vm scp "$staging/$archive" "$NAME:" --worker=all

# Runs on the workers: what is expanded here are the names and versions alone. The images come with an older
# Python than the package needs, so uv brings one.
on_all_workers "set -eu
mkdir -p ~/$REMOTE_REPOSITORY
find ~/$REMOTE_REPOSITORY -mindepth 1 -maxdepth 1 ! -name runs -exec rm -rf {} +
tar -xzf ~/$archive -C ~/$REMOTE_REPOSITORY
python3 -m pip install --quiet --user --upgrade uv
[ -x ~/$REMOTE_ENVIRONMENT/bin/python ] || python3 -m uv venv --quiet --python $PYTHON ~/$REMOTE_ENVIRONMENT
cd ~/$REMOTE_REPOSITORY
python3 -m uv pip install --quiet --python ~/$REMOTE_ENVIRONMENT/bin/python -e '.[train,tpu]'
~/$REMOTE_ENVIRONMENT/bin/python -c 'import jax, jaxrl_llm; print(\"jaxrl_llm\", jaxrl_llm.__version__, \"on jax\", jax.__version__)'"
$DRY_RUN || echo "set up $commit on every worker of $NAME"
