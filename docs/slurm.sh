#!/bin/bash
# One seed of the whole pipeline on two machines of eight GPUs:
#   sbatch --export=ALL,CONFIG=configs/cifar100.yaml,SEED=0 docs/slurm.sh
# data.root and output_dir must lie on a file system that all machines see. Submitted again after a time limit, it goes
# on where it was: finished stages say so at once, training goes on from its last epoch.
#SBATCH --job-name=coarse2fine
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
set -euo pipefail
. .venv/bin/activate

args="--config ${CONFIG:?} seed=${SEED:-0}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
spread() { # a training or inference stage on all GPUs of all machines
    srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \
        --rdzv-id="$SLURM_JOB_ID" "$@"
}

spread train_coarse.py $args
spread extract_features.py $args
spread uncertainty_filter.py $args
# A coarse class a core of the first machine; cluster.joblib_backend=dask spreads them over all of them.
srun --nodes=1 --ntasks=1 python cluster_fine.py $args cluster.n_jobs="$SLURM_CPUS_PER_TASK"
srun --nodes=1 --ntasks=1 python cluster_fine.py $args cluster.method=random
spread finetune.py $args
spread multihead.py $args
spread train_coarse.py $args coarse.match=finetune/umap_hdbscan
spread finetune.py $args finetune.labels=random
