# shellcheck shell=bash
# What is special about your centre. Copy to slurm/site.sh, keep one block, delete the others. slurm/common.sh reads it
# on the first node of every job, before anything else; it lists all variables. The environment of sbatch comes before:
#   LAUNCHER=mpirun sbatch slurm/resnet18_8k.sbatch       works where the lines below say ${LAUNCHER:-...}

export DIST_LARS_DATA=${DIST_LARS_DATA:-/project/data/imagenet-packed} # as compute nodes see it
# Accounts and partitions are options of sbatch: export SBATCH_ACCOUNT=..., SBATCH_PARTITION=... in your .bashrc.

# --- 1. modules, and the .venv of `make install` ----------------------------------------------------------------------
# The modules that were loaded for `make install MPI_HOME=... HOROVOD_GPU_OPERATIONS=NCCL`, none without MPI_HOME.
#module purge
#module load gcc/12 openmpi/5.0 cuda/13.0
#LAUNCHER=${LAUNCHER:-auto}                # srun where its PMIx works, else mpirun
#INTERFACE=ib0                             # the fast network, where nodes have several
#STAGE='$SLURM_TMPDIR'                     # packed shards go to the node's own disk first; the quotes are meant

# --- 2. a container: compute nodes without internet, a small file quota, another processor than the login node's -------
#module load apptainer
#CONTAINER=${CONTAINER:-/project/images/dist_lars.sif}
#CONTAINER_ARGS="--bind /scratch"          # more folders that jobs need
# Pyxis instead of Apptainer, where `srun --help` knows --container-image:
#CONTAINER=${CONTAINER:-/project/images/dist_lars.sqsh}
#CONTAINER_ARGS="--container-mounts=/scratch:/scratch"

# --- 3. Cray: its own MPI and process manager --------------------------------------------------------------------------
# Built by `make install MPI_HOME=$CRAY_MPICH_DIR HOROVOD_GPU_OPERATIONS=NCCL`.
#module load PrgEnv-gnu cray-mpich cudatoolkit
#export MPICH_GPU_SUPPORT_ENABLED=0        # NCCL carries the gradients, MPI only small messages from the host
#export LD_LIBRARY_PATH=$CRAY_LD_LIBRARY_PATH:${LD_LIBRARY_PATH:-}
#LAUNCHER=srun MPI_TYPE=cray_shasta
#INTERFACE=hsn0
