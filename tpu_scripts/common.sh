# shellcheck shell=bash disable=SC2034
# What the scripts of this folder share. Sourced, never run.
#
# A script that sources this file defines usage() and, in own_option(), its own options; parse_options then
# fills NAME, ZONE, PROJECT, DRY_RUN and ARGUMENTS (what stands after --).

set -euo pipefail

# On a worker: the copied repository, and the Python environment beside it (relative to the home folder).
REMOTE_REPOSITORY=jaxrl_llm
REMOTE_ENVIRONMENT=jaxrl_llm_venv

NAME=""
ZONE=""
PROJECT=""
DRY_RUN=false
ARGUMENTS=()

# What of jaxrl-llm several hosts run as one.
STAGES="demo sft reward-model prm dpo kto grpo ppo trpo distill star evaluate"

COMMON_OPTIONS="\
  --name NAME        name of the TPU (and of its queued resource)
  --zone ZONE        its zone, such as us-east5-a
  --project PROJECT  Google Cloud project; gcloud's current one if left out
  --dry-run          print the commands instead of running them
  -h, --help         this text"

die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# The value of option $1, which is $2 if there is a second argument.
value_of() {
  if (($# < 2)) || [[ $2 == --* ]]; then die "$1 needs a value; see --help"; fi
  printf '%s' "$2"
}

parse_options() {
  while (($# > 0)); do
    case $1 in
      --name) NAME=$(value_of "${@:1:2}"); shift 2 ;;
      --zone) ZONE=$(value_of "${@:1:2}"); shift 2 ;;
      --project) PROJECT=$(value_of "${@:1:2}"); shift 2 ;;
      --dry-run) DRY_RUN=true; shift ;;
      -h | --help) usage; exit 0 ;;
      --) shift; ARGUMENTS=("$@"); break ;;
      *)
        # own_option sets CONSUMED to how many words it took, none if it does not know the first.
        CONSUMED=0
        own_option "$@"
        ((CONSUMED > 0)) || die "unknown argument '$1'; see --help"
        shift "$CONSUMED"
        ;;
    esac
  done
  [[ -n $NAME ]] || die "--name is missing; see --help"
  [[ -n $ZONE ]] || die "--zone is missing; see --help"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    die "--name '$NAME': lower-case letters, digits and dashes, the first a letter, 63 at most"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone '$ZONE' is no zone; one looks like us-east5-a"
  $DRY_RUN || command -v gcloud >/dev/null ||
    die "gcloud is not on PATH; install the Google Cloud CLI, or look at the commands with --dry-run"
}

no_arguments() {
  ((${#ARGUMENTS[@]} == 0)) || die "unknown argument '${ARGUMENTS[0]}'; see --help"
}

# Runs a command, or prints it so that a shell could read it back.
run() {
  if $DRY_RUN; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# gcloud compute tpus ... in the TPU's zone and project, never asking a question.
tpus() {
  run gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet
}

# State of the queued resource; NONE where there is none, UNKNOWN where gcloud does not say.
state() {
  local complaint
  if complaint=$(tpus queued-resources describe "$NAME" '--format=value(state.state)' 2>&1 >&3); then
    return
  elif [[ $complaint == *NOT_FOUND* ]]; then
    printf NONE
  else
    printf UNKNOWN
  fi
} 3>&1

# Runs one shell line on every worker at once; fails if it fails on any.
on_all_workers() {
  tpus tpu-vm ssh "$NAME" --worker=all --command="$1"
}

# Words as one line that a shell reads back.
words() {
  printf '%q ' "$@"
}

# Sets ON_A_HOST to what Python is given there for the words after --: jaxrl-llm STAGE or a script, with arguments.
# The stage is run as a module, which is there wherever the package is.
for_python() {
  if [[ ${1-} =~ ^python3?$ ]]; then shift; fi
  if [[ ${1-} == -m && ${2-} == jaxrl_llm ]]; then shift; set -- jaxrl-llm "${@:2}"; fi
  (($# > 0)) || die "nothing to run: say jaxrl-llm STAGE or a script after --; see --help"
  ON_A_HOST=("$1")
  if [[ $1 == jaxrl-llm ]]; then
    shift
    [[ -n ${1-} && " $STAGES " == *" ${1//_/-} "* ]] ||
      die "'jaxrl-llm ${1-}' is nothing that several hosts run; they run: $STAGES"
    ON_A_HOST=(-m jaxrl_llm "$1")
  elif [[ $1 != *.py ]]; then
    die "'$1' is neither jaxrl-llm nor a Python script; say jaxrl-llm grpo, or experiments/grpo_gsm8k.py"
  fi
  # jax.distributed.initialize() finds the other hosts by itself on a TPU, and is right on a single one too.
  ON_A_HOST+=(--distributed "${@:2}")
}

# The run folder that these words name, of two the last one; that of --resume=FOLDER, too. After for_python.
run_folder() {
  local folder="" before="" word
  [[ "${ON_A_HOST[*]:0:3}" != "-m jaxrl_llm evaluate" ]] ||
    die "evaluate has no run folder to go on with; launch.sh starts it"
  for word in "$@"; do
    [[ ! $word =~ ^--(run[-_]dir|output[-_]dir|resume)=(.*)$ ]] || folder=${BASH_REMATCH[2]}
    [[ ! $before =~ ^--(run[-_]dir|output[-_]dir|resume)$ || $word == --* ]] || folder=$word
    before=$word
  done
  case $folder in
    /*) printf '%s' "$folder" ;;
    *://*) die "--run-dir=$folder is no folder: mount the bucket on every worker, and say where it lies there" ;;
    *) die "say --run-dir=/FOLDER after the command, on storage that outlives the slice and all workers share" ;;
  esac
}

# Shell text for a host: adds --resume to its "$@", once, where the run folder $1 holds a run.
going_on() {
  printf 'case " $* " in *" --resume"*) ;; *) [ ! -e %q/config.json ] || set -- "$@" --resume ;; esac' "$1"
}

# The files among these words that are named relative to the repository: FILE.py, --config=FILE, --rewards FILE.py:NAME.
relative_files() {
  local word
  for word in "$@"; do
    word=${word#--*=}
    [[ $word != *.py:* ]] || word=${word%%.py:*}.py
    case $word in
      /* | '~'* | *:* | *' '*) ;;
      *.py | *.yaml | *.yml | *.json | *.jsonl | *.csv | *.parquet) printf '%s\n' "$word" ;;
    esac
  done
}
