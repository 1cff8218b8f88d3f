#!/usr/bin/env bash
# Starts a run on GKE: one JobSet with a pod for each host, through kubectl or XPK.
#
#   launch/gke.sh COMMAND [flags] [-- FLAGS OF TRAIN]
#
# Commands
#   build     builds launch/Dockerfile as --image and pushes it
#   create    starts the JobSet (kubectl apply), with the files of configs/ as they are here
#   xpk       starts the same run with xpk, which makes its own JobSet; needs --cluster and --type,
#             and --workdir or a storage that is attached to that cluster at /runs. The config is
#             that of the image, so one that is not committed is refused
#   tail      follows the log
#   status    shows the JobSet and its pods
#   delete    ends the run; the volume claim stays
#
# Flags
#   --name=NAME --image=IMAGE         name of the JobSet (default ares); image of the container
#   --workdir=gs://BUCKET/RUN         the run's folder; the same create resumes from it after a
#                                     preemption. The pods need an account that may write there
#   --claim=PVC                       instead: a volume claim that is mounted at /runs and holds the
#                                     run
#   --accelerator=LABEL --topology=T --chips=N
#                                     TPUs: e.g. tpu-v5-lite-podslice, 2x4, 8
#   --gpus=N --accelerator=LABEL      GPUs: e.g. 8, nvidia-h100-80gb
#   --restarts=N                      restarts of the JobSet after preemptions and lost hosts; default
#                                     20. A mistake in a config or file (exit code 1 or 2) ends it
#   --hosts=N                         pods of the run; default 1. A TPU slice has one for each of its
#                                     machines: 4x8 of v5e with --chips=4 has 8
#   --slices=N                        TPU slices of --hosts pods each; default 1. Gradients are summed
#                                     over the data-centre network; training gets
#                                     --config.mesh.slice=N
#   --cluster=NAME --type=TYPE        for xpk, e.g. v5litepod-8
#   --dry-run                         prints every command, starts nothing
#
# Several slices are a replicated job with one replica and one node pool for each slice. If a slice has
# several machines, GKE sets the variables by which the pods find each other (MEGASCALE_*). A --claim of
# several pods must be one that all may write (ReadWriteMany). A pod that is taken away gets SIGTERM;
# all pods save the same step, and the pods of the next restart resume from there.
# This script has not run on a cluster. It is tested against a fake kubectl that records its calls.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

name=ares image='' claim='' workdir='' accelerator='' topology='' chips='' gpus='' restarts=20 hosts=1 slices=1
cluster='' type=''
parse 'name image claim workdir accelerator topology chips gpus restarts hosts slices cluster type' "$@"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices must be a number >= 1"
[[ $slices == 1 || -z $gpus ]] || die "--slices=$slices: only TPUs have slices; for GPUs use --hosts"
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts=$restarts must be a number"
[[ $hosts =~ ^[1-9][0-9]*$ ]] || die "--hosts=$hosts must be a number >= 1"
[[ -z $workdir || $workdir == gs://?*/?* ]] || die "--workdir=$workdir must be gs://BUCKET/RUN"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "--name=$name must be lower-case letters, digits, -"

need_train_flags() {
  local word
  need_config "${words[@]}"
  [[ $config =~ ^configs/[^/]+$ ]] || die "$config is not taken to the pods; move it to configs/"
  for word in "${words[@]}"; do
    [[ $word != --config.mesh.slice* ]] || die "--slices sets this; leave out $word"
  done
  words+=("--workdir=${workdir:-/runs/$name}")
  [[ $slices == 1 ]] || words+=("--config.mesh.slice=$slices")
}

# Prints a text as YAML in double quotes.
yaml() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

# Puts each of several slices into a node pool of its own, whose chips have direct links.
apart() {
  [[ $slices != 1 ]] || return 0
  printf '\n  annotations:\n    alpha.jobset.sigs.k8s.io/exclusive-topology: '
  printf 'cloud.google.com/gke-nodepool'
}

# Variables by which GPU pods find each other; on TPU slices GKE sets its own.
peers() {
  [[ $hosts != 1 && -n $gpus ]] || return 0
  cat <<EOF

                  env:
                    - name: JAX_COORDINATOR_ADDRESS
                      value: "$name-train-0-0.$name:8476"
                    - name: JAX_NUM_PROCESSES
                      value: "$hosts"
                    - name: JAX_PROCESS_ID
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
EOF
}

jobset() {
  local arguments='' word mount='' volume='' resources="google.com/tpu: $chips"
  local selector="cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology"
  if [[ -n $gpus ]]; then
    resources="nvidia.com/gpu: $gpus" selector="cloud.google.com/gke-accelerator: $accelerator"
  fi
  if [[ -n $claim ]]; then
    mount='
                    - name: runs
                      mountPath: /runs'
    volume="
                - name: runs
                  persistentVolumeClaim:
                    claimName: $claim"
  fi
  for word in "${words[@]}"; do
    arguments+="${arguments:+, }$(yaml "$word")"
  done
  cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name$(apart)
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: train
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [1, 2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                $selector
              containers:
                - name: train
                  image: $image
                  args: [$arguments]$(peers)
                  resources:
                    limits:
                      $resources
                  volumeMounts:
                    - name: configs
                      mountPath: /app/configs$mount
              volumes:
                - name: configs
                  configMap:
                    name: $name-configs$volume
EOF
}

build() {
  need image
  local extra=tpu
  [[ -z $gpus ]] || extra=cuda12
  call docker build --build-arg "JAX_EXTRA=$extra" --build-arg "COMMIT=$(git -C "$root" describe --always --dirty --abbrev=12 --exclude='*')" -f "$here/Dockerfile" -t "$image" "$here/.."
  call docker push "$image"
}

create() {
  [[ $slices == 1 || $hosts != 1 ]] ||
    die "--slices=$slices: GKE connects slices only if each has several hosts; give --hosts=2 or more"
  need_train_flags
  need image
  [[ -n $claim$workdir ]] || die "give --workdir=gs://BUCKET/RUN or --claim; --help shows how"
  [[ -z $claim || -z $workdir ]] || die "--workdir and --claim are both the run's folder; give one"
  need accelerator
  [[ -n $gpus ]] || { need chips && need topology; }
  # The pods get configs/ as it is here, committed or not, and built into the image or not.
  call bash -c "cd $(quoted "$root") && kubectl create configmap $name-configs --from-file=configs --dry-run=client -o yaml | kubectl apply -f -"
  feed "$(jobset)" kubectl apply -f -
}

xpk_run() {
  need_train_flags
  need image
  need cluster
  need type
  [[ -z $(git -C "$root" status --porcelain -- "$config" 2>&1) ]] ||
    die "$config is not committed, and xpk takes it from the image: commit it and build, or use create"
  call xpk workload create "--cluster=$cluster" "--workload=$name" "--tpu-type=$type" \
    "--num-slices=$slices" "--docker-image=$image" "--max-restarts=$restarts" --restart-on-exit-codes=75 \
    "--command=$(quoted python -m ares_jax.train "${words[@]}")"
}

case $command in
  build | create) "$command" ;;
  xpk) xpk_run ;;
  tail) call kubectl logs --follow --tail=100 -l "jobset.sigs.k8s.io/jobset-name=$name" ;;
  status)
    call kubectl get jobset "$name"
    call kubectl get pods -l "jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  delete)
    call kubectl delete jobset "$name"
    call kubectl delete configmap "$name-configs" --ignore-not-found
    ;;
  *) die "unknown command $command; --help lists the commands" ;;
esac
