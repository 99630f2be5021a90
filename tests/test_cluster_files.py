"""Every file of cluster/ by the validator of whoever reads it, and the local cluster for real."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from raysweep import run, submit

REPOSITORY = Path(__file__).resolve().parents[1]
CLUSTER = REPOSITORY / "cluster"
BIN = Path(sys.executable).parent
PINS = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
HEADED = ["Dockerfile", "aws.yaml", "gcp.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "local/cluster",
          "mlflow/Dockerfile", "mlflow/compose.yaml", "slurm/sweep.sbatch"]  # fmt: skip


def read(name):
    return (CLUSTER / name).read_text()


def documents(name):
    return list(yaml.safe_load_all(read(name)))


# All of them


@pytest.mark.parametrize("name", HEADED)
def test_a_header_says_what_it_needs_does_and_costs(name):
    header = re.match(r"(?:#!.*\n)?((?:#.*\n)+)", read(name)).group(1)
    assert all(f"# {word}" in header for word in ("Needs:", "Command:", "Costs:", "Remove:")), header


def test_every_file_is_in_the_table():
    told = read("README.md")
    files = {path.relative_to(CLUSTER).as_posix() for path in CLUSTER.rglob("*") if path.is_file()}
    assert files - {"README.md", "Dockerfile.dockerignore", "mlflow/.env.example"} == set(HEADED)
    assert not [name for name in HEADED if name != "mlflow/Dockerfile" and f"({name})" not in told]


@pytest.mark.parametrize("name", HEADED)
def test_versions_are_those_of_the_constraints(name):
    text = read(name)
    found = dict(re.findall(r'"?([\w-]+)(?:\[\w+\])?==([\d.]+)"?', text))
    assert {package: PINS[package] for package in found} == found
    assert set(re.findall(r"rayproject/ray:([\d.]+)", text)) <= {PINS["ray"]}
    assert set(re.findall(r'rayVersion: "([\d.]+)"', text)) <= {PINS["ray"]}


def commands_in(text):
    """Calls of raysweep's commands, continued lines joined and shell variables left as words."""
    joined = re.sub(r"\\*\n\s*#?\s+(?=--)", " ", text)
    return re.findall(r"(?:raysweep |-m raysweep\.)(run|submit)\b([^\n&|`;]*)", joined)


@pytest.mark.parametrize("name", [*HEADED, "README.md"])
def test_commands_use_options_that_exist(name, capsys):
    parsers = {"run": run.build_parser(), "submit": submit.build_parser()}
    for command, rest in commands_in(read(name)):
        words = [word for word in shlex.split(rest.replace("$@", "")) if word]
        parsers[command].parse_args(words)
    if name in ("aws.yaml", "gcp.yaml", "slurm/sweep.sbatch", "kuberay/rayjob.yaml", "local/cluster"):
        assert commands_in(read(name))


@pytest.mark.parametrize("name", HEADED)
def test_no_secret_lies_in_a_file(name):
    assert re.findall(r"\b[0-9a-f]{24,}\b|AKIA[0-9A-Z]{16}|-----BEGIN|://[^/\s:$]+:[^/\s$]+@", read(name)) == []
    for document in documents(name) if name.startswith("kuberay") else ():
        assert set(document.get("stringData", {}).values()) <= {"https://MLFLOW", "REPLACE"}


@pytest.mark.parametrize("name", [name for name in HEADED if "ocker" not in name and "mlflow" not in name])
def test_every_cluster_wants_a_token(name):
    assert re.search(r"RAY_AUTH_MODE=token|authOptions:\n\s+mode: token", read(name))


# Ray's cluster launcher


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_ray_up_takes_it(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load(read(name)))
    validate_config(prepared)
    head, workers = (prepared["available_node_types"][kind] for kind in ("head", "gpu"))
    assert head["resources"] == {"CPU": 0}
    assert (workers["min_workers"], workers["max_workers"], workers["resources"]["GPU"]) == (0, 8, 1)
    # Docker hands no GPU on by itself, and Ray's defaults would install packages that the image has.
    assert prepared["docker"]["worker_run_options"] == ["--gpus all"]
    assert prepared["setup_commands"] == prepared["head_setup_commands"] == []
    for commands in (prepared["head_start_ray_commands"], prepared["worker_start_ray_commands"]):
        assert "RAYSWEEP_STORAGE=" in " ".join(commands)
    with pytest.raises(Exception, match="unexpected"):
        validate_config(prepare_config(yaml.safe_load(read(name)) | {"wrong_key": 1}))


def test_aws_machines_have_an_image_and_rights_of_their_own():
    """Ray's default image is of 2023 and has no driver for today's CUDA; a head with no rights starts no workers."""
    nodes = yaml.safe_load(read("aws.yaml"))["available_node_types"]
    settings = [nodes[kind]["node_config"] for kind in ("head", "gpu")]
    assert [setting["ImageId"] for setting in settings] == ["AMI", "AMI"]
    names = [setting["IamInstanceProfile"]["Name"] for setting in settings]
    assert names == ["raysweep-head", "raysweep-node"]
    assert all(f"`{name}`" in read("aws.yaml") for name in names)


def test_aws_machines_give_no_credentials_away_and_encrypt_their_disks():
    nodes = yaml.safe_load(read("aws.yaml"))["available_node_types"]
    for kind in ("head", "gpu"):
        setting = nodes[kind]["node_config"]
        assert setting["MetadataOptions"]["HttpTokens"] == "required"
        assert all(device["Ebs"]["Encrypted"] for device in setting["BlockDeviceMappings"])


def test_heads_may_start_only_workers():
    assert not re.search(
        "FullAccess|roles/(owner|editor|compute.admin|storage.admin)", read("aws.yaml") + read("gcp.yaml")
    )
    (policy,) = re.findall(r"```json\n(.*?)```", read("README.md"), re.S)
    statements = json.loads(policy)["Statement"]
    actions = [(action, statement) for statement in statements for action in [statement["Action"]]]
    actions = [(one, s) for action, s in actions for one in ([action] if isinstance(action, str) else action)]
    assert not [action for action, _ in actions if "*" in action]
    for action, statement in actions:
        assert action.startswith("ec2:Describe") or statement["Resource"] != "*", action
        if action in ("ec2:TerminateInstances", "ec2:CreateTags", "iam:PassRole"):
            assert statement["Condition"], action
    types = yaml.safe_load(read("aws.yaml"))["available_node_types"]["gpu"]["node_config"]["InstanceType"]
    assert f'"ec2:InstanceType": "{types}"' in policy
    for kind in ("head", "gpu"):
        node = yaml.safe_load(read("gcp.yaml"))["available_node_types"][kind]["node_config"]
        own = {"head": "raysweep-head", "gpu": "raysweep-node"}[kind]
        assert node["serviceAccounts"][0]["email"] == f"{own}@PROJECT.iam.gserviceaccount.com"


def test_images_of_nodes_are_pinned_by_their_content():
    """`DIGEST` is to be replaced, and no one takes it before: the image is the user's own."""
    for name in ("aws.yaml", "gcp.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"):
        images = re.findall(r"^\s*(?:- )?image: (\S+)", read(name), re.M)
        assert images
        assert set(images) == {"REGISTRY/raysweep@sha256:DIGEST"}, name
        assert "DIGEST (docker push prints it)" in read(name)
    own, base = read("mlflow/compose.yaml"), read("README.md")
    for image in re.findall(r"image: (\S+)", own):
        assert re.fullmatch(r"\$\{\w+_IMAGE:-[\w./-]+:\d[\w.]*\}", image), image
    assert "RepoDigests" in own
    assert "RepoDigests" in base


def test_workers_are_spot_and_heads_are_not():
    aws, gcp = (yaml.safe_load(read(name))["available_node_types"] for name in ("aws.yaml", "gcp.yaml"))
    assert aws["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gcp["gpu"]["node_config"]["scheduling"][0]["provisioningModel"] == "SPOT"
    assert "InstanceMarketOptions" not in aws["head"]["node_config"]
    assert "scheduling" not in gcp["head"]["node_config"]


# KubeRay: what its CRDs (ray.io/v1, KubeRay 1.5 and 1.6) and Kubernetes' core types say of the fields that are used

CLUSTER_FIELDS = {"rayVersion": str, "enableInTreeAutoscaling": bool, "autoscalerOptions": dict, "authOptions": dict,
                  "headGroupSpec": dict, "workerGroupSpecs": list, "suspend": bool, "headServiceAnnotations": dict,
                  "gcsFaultToleranceOptions": dict}  # fmt: skip
AUTOSCALER_FIELDS = {"idleTimeoutSeconds": int, "upscalingMode": ("Default", "Aggressive", "Conservative"), "env": list,
                     "envFrom": list, "image": str, "imagePullPolicy": str, "resources": dict, "version": str,
                     "volumeMounts": list, "securityContext": dict}  # fmt: skip
AUTH_FIELDS = {"mode": ("disabled", "token"), "secretName": str, "enableK8sTokenAuth": bool}
HEAD_FIELDS = {"rayStartParams": dict, "template": dict, "serviceType": str, "headService": dict, "enableIngress": bool}
WORKER_FIELDS = {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "numOfHosts": int,
                 "rayStartParams": dict, "template": dict, "scaleStrategy": dict, "idleTimeoutSeconds": int,
                 "suspend": bool}  # fmt: skip
JOB_FIELDS = {"entrypoint": str, "runtimeEnvYAML": str, "jobId": str, "metadata": dict, "clusterSelector": dict,
              "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), "submitterConfig": dict,
              "submitterPodTemplate": dict, "backoffLimit": int, "activeDeadlineSeconds": int,
              "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int, "rayClusterSpec": dict, "suspend": bool,
              "managedBy": str, "deletionStrategy": dict, "entrypointNumCpus": (int, float),
              "entrypointNumGpus": (int, float), "entrypointResources": str}  # fmt: skip
POD_FIELDS = {"containers": list, "volumes": list, "tolerations": list, "serviceAccountName": str, "nodeSelector": dict,
              "affinity": dict, "securityContext": dict, "initContainers": list, "imagePullSecrets": list,
              "automountServiceAccountToken": bool}  # fmt: skip
CONTAINER_FIELDS = {"name": str, "image": str, "env": list, "ports": list, "resources": dict, "volumeMounts": list,
                    "command": list, "args": list, "lifecycle": dict, "imagePullPolicy": str,
                    "securityContext": dict}  # fmt: skip


def check(value, fields, required=()):
    assert set(required) <= set(value), f"{set(required) - set(value)} missing"
    for name, content in value.items():
        assert name in fields, f"{name}: no such field"
        expected = fields[name]
        if isinstance(expected, tuple) and isinstance(expected[0], str):
            assert content in expected, f"{name}: {content}"
        else:
            assert isinstance(content, expected), f"{name}: {content!r}"


def check_pod(template, names):
    """A pod template of a Ray group; `names` are the Secrets, claims and service accounts of the same file."""
    pod = template["spec"]
    check(pod, POD_FIELDS, ["containers"])
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for volume in volumes.values():
        assert volume["persistentVolumeClaim"]["claimName"] in names["PersistentVolumeClaim"]
    if "serviceAccountName" in pod:
        assert pod["serviceAccountName"] in names["ServiceAccount"]
    (container,) = pod["containers"]
    check(container, CONTAINER_FIELDS, ["name", "image", "resources"])
    assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes)
    for variable in container["env"]:
        assert set(variable) in ({"name", "value"}, {"name", "valueFrom"})
        if "value" in variable:
            assert isinstance(variable["value"], str), "Kubernetes takes text only"
        else:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["key"] in names["Secret"][reference["name"]]["stringData"]
    check_rights(template, container)
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert requests == limits, "a Ray node counts on what it was promised"
    assert all(isinstance(amount, str) for amount in requests.values())
    return container


def check_rights(template, container):
    """What Kubernetes asks of a pod at its level "restricted"; one container more gives a new volume to Ray's user."""
    pod = template["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in (container, *pod.get("initContainers", [])):
        assert each["securityContext"]["allowPrivilegeEscalation"] is False
        assert each["securityContext"]["capabilities"]["drop"] == ["ALL"]
    for first in pod.get("initContainers", []):
        assert first["securityContext"]["capabilities"]["add"] == ["CHOWN"]
        assert first["command"][0] == "chown"
    is_head = container["name"] == "ray-head"
    assert pod.get("automountServiceAccountToken", True) is is_head


def check_policy(policy, cluster):
    """Only nodes of the cluster reach its ports; the operator and the submitter reach the dashboard."""
    assert policy["apiVersion"] == "networking.k8s.io/v1"
    spec = policy["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    labels = [cluster["headGroupSpec"]["template"]["metadata"]["labels"]]
    labels += [group["template"]["metadata"]["labels"] for group in cluster["workerGroupSpecs"]]
    assert all(label == spec["podSelector"]["matchLabels"] for label in labels)
    inside, dashboard = spec["ingress"]
    assert inside == {"from": [{"podSelector": spec["podSelector"]}]}
    assert dashboard["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert {"podSelector": {}} not in dashboard["from"]


def check_cluster(spec, names):
    check(spec, CLUSTER_FIELDS, ["headGroupSpec"])
    check(spec["autoscalerOptions"], AUTOSCALER_FIELDS)
    check(spec["authOptions"], AUTH_FIELDS, ["mode"])
    check(spec["headGroupSpec"], HEAD_FIELDS, ["template", "rayStartParams"])
    head = check_pod(spec["headGroupSpec"]["template"], names)
    assert {port["name"]: port["containerPort"] for port in head["ports"]} == {
        "gcs-server": 6379, "dashboard": 8265, "client": 10001,
    }  # fmt: skip
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    settings = {variable["name"]: variable for variable in head["env"]}
    assert "valueFrom" in settings["MLFLOW_TRACKING_URI"]
    for group in spec["workerGroupSpecs"]:
        check(group, WORKER_FIELDS, ["groupName", "minReplicas", "maxReplicas", "template", "rayStartParams"])
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        worker = check_pod(group["template"], names)
        assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
        storage = next(variable for variable in worker["env"] if variable["name"] == "RAYSWEEP_STORAGE")
        assert storage == settings["RAYSWEEP_STORAGE"]
        mounted = [mount["mountPath"] for mount in worker.get("volumeMounts", [])]
        assert storage["value"].startswith("s3://") or storage["value"] in mounted


@pytest.mark.parametrize("name", ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"])
def test_kuberay_takes_it(name):
    *others, main = documents(name)
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", d["metadata"]["name"]) for d in [*others, main])
    names = {kind: {} for kind in ("Secret", "PersistentVolumeClaim", "ServiceAccount")}
    (policy,) = (document for document in others if document["kind"] == "NetworkPolicy")
    others.remove(policy)
    for document in others:
        assert document["apiVersion"] == "v1"
        names[document["kind"]][document["metadata"]["name"]] = document
    for claim in names["PersistentVolumeClaim"].values():
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"], "every node writes to it"
    assert main["apiVersion"] == "ray.io/v1"
    assert set(main) == {"apiVersion", "kind", "metadata", "spec"}
    if main["kind"] == "RayJob":
        check(main["spec"], JOB_FIELDS, ["entrypoint", "rayClusterSpec"])
        assert main["spec"]["shutdownAfterJobFinishes"], "ttlSecondsAfterFinished counts only then"
        assert len(main["metadata"]["name"]) <= 47, "KubeRay's limit"
        check_cluster(main["spec"]["rayClusterSpec"], names)
        check_policy(policy, main["spec"]["rayClusterSpec"])
        assert f"job-name: {main['metadata']['name']}" in read(name), "KubeRay's job that submits has the RayJob's name"
    else:
        assert main["kind"] == "RayCluster"
        assert main["metadata"]["name"] not in names["Secret"], "KubeRay keeps the token in a Secret of that name"
        check_cluster(main["spec"], names)
        check_policy(policy, main["spec"])


@pytest.mark.parametrize("name", ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"])
def test_the_check_finds_a_pod_with_more_rights(name):
    main = documents(name)[-1]["spec"]
    for group in (cluster := main.get("rayClusterSpec", main))["workerGroupSpecs"]:
        template = group["template"]
        (container,) = template["spec"]["containers"]
        check_rights(template, container)
        for part, key in ((template["spec"], "securityContext"), (container, "securityContext")):
            kept = part.pop(key)
            with pytest.raises(KeyError, match="securityContext"):
                check_rights(template, container)
            part[key] = kept
        template["metadata"]["labels"] = {"another": "label"}
    policy = next(document for document in documents(name) if document["kind"] == "NetworkPolicy")
    with pytest.raises(AssertionError):
        check_policy(policy, cluster)


def test_the_check_finds_what_is_wrong():
    for wrong in ({"rayVersio": "2"}, {"rayVersion": 2}, {"headGroupSpec": {}, "suspend": "no"}):
        with pytest.raises(AssertionError):
            check(wrong, CLUSTER_FIELDS, ["headGroupSpec"])
    with pytest.raises(AssertionError):
        check({"mode": "tokn"}, AUTH_FIELDS)


# Shells


@pytest.mark.parametrize("name", ["local/cluster", "slurm/sweep.sbatch"])
def test_shellcheck_finds_nothing(name):
    done = subprocess.run([BIN / "shellcheck", CLUSTER / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert os.access(CLUSTER / "local/cluster", os.X_OK)


@pytest.mark.process
def test_slurm_starts_one_ray_on_each_node():
    from ray.scripts.symmetric_run import symmetric_run

    text = read("slurm/sweep.sbatch")
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))
    assert settings["ntasks-per-node"] == "1"
    options = {option for parameter in symmetric_run.params for option in getattr(parameter, "opts", [])}
    assert {"--address", "--min-nodes"} <= options
    started = subprocess.run([BIN / "ray", "start", "--help"], capture_output=True, text=True, check=True).stdout
    own = re.search(r"ray symmetric-run (.*?) -- ", text.replace("\\\n", " "), re.S).group(1)
    for option in re.findall(r"--[\w-]+", own):
        assert option in options or option in started, option
    assert "env RAY_ADDRESS=" in text, "symmetric-run does not set it"


# Docker


@pytest.mark.parametrize("name", ["Dockerfile", "mlflow/Dockerfile"])
def test_dockerfiles_parse_and_end_without_root(name, tmp_path):
    from dockerfile_parse import DockerfileParser

    parser = DockerfileParser(fileobj=(tmp_path / "Dockerfile").open("w+b"))
    parser.content = read(name)
    steps = [(step["instruction"], step["value"]) for step in parser.structure]
    known = {"FROM", "RUN", "COPY", "WORKDIR", "USER", "ENV", "EXPOSE", "COMMENT"}
    assert {instruction for instruction, _ in steps} <= known
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", parser.baseimage)
    assert not parser.baseimage.endswith(":latest")
    users = [value for instruction, value in steps if instruction == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    kept = {line[1:] for line in read("Dockerfile.dockerignore").splitlines() if line.startswith("!")}
    for instruction, value in steps:
        if instruction == "COPY":
            sources = [word for word in value.split() if not word.startswith("--")][:-1]
            assert all((REPOSITORY / source).exists() and source in kept for source in sources), value


@pytest.fixture
def composed(tmp_path):
    """Reads compose.yaml with podman-compose's parser; a stand-in for podman answers its question for a version."""

    def read_with(**secrets):
        (tmp_path / "podman").write_text("#!/bin/sh\necho podman version 5.2.0\n")
        (tmp_path / "podman").chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), **secrets}
        command = [BIN / "podman-compose", "-f", CLUSTER / "mlflow" / "compose.yaml", "config"]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return read_with


SECRETS = ("POSTGRES_PASSWORD", "MLFLOW_DB_PASSWORD", "OPTUNA_DB_PASSWORD", "S3_SECRET_KEY", "MLFLOW_SECRET_KEY",
           "MLFLOW_ADMIN_PASSWORD")  # fmt: skip


def test_compose_takes_it(composed):
    done = composed(**{name: f"value-of-{name}" for name in SECRETS})
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout)
    services = found["services"]
    assert set(services) == {"postgres", "s3", "bucket", "mlflow"}
    for name, service in services.items():
        assert ("image" in service) != ("build" in service), name
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert {entry["source"] for entry in service.get("configs", [])} <= set(found["configs"])
        named = {volume.partition(":")[0] for volume in service.get("volumes", []) if isinstance(volume, str)}
        assert named <= set(found["volumes"])
        for other, wants in service.get("depends_on", {}).items():
            assert wants["condition"] in ("service_healthy", "service_completed_successfully")
            assert wants["condition"] != "service_healthy" or "healthcheck" in services[other]
    assert "value-of-S3_SECRET_KEY" in found["configs"]["s3"]["content"]
    assert "mlflow_auth" in found["configs"]["databases"]["content"]
    # Every process of a machine can read a command; `docker compose config` shows no more than the variables' names.
    for name, service in services.items():
        said = f"{service.get('command', '')}{service.get('healthcheck', '')}"
        assert "value-of" not in said, name
        assert not re.search("PASSWORD|SECRET", said), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
    assert "value-of" not in found["configs"]["databases"]["content"]
    passwords = {
        name: service["environment"].get("PGPASSWORD") for name, service in services.items() if "environment" in service
    }
    assert passwords["mlflow"] == "value-of-MLFLOW_DB_PASSWORD", "not that of the superuser"
    assert set(services["mlflow"]["networks"]) == {"database", "objects"}
    assert [list(services[name]["networks"]) for name in ("postgres", "s3")] == [["database"], ["objects"]]


@pytest.mark.parametrize("missing", SECRETS)
def test_compose_asks_for_each_secret(composed, missing):
    done = composed(**{name: "x" for name in SECRETS if name != missing})
    assert done.returncode != 0
    assert missing in done.stderr
    assert f"{missing}=\n" in read("mlflow/.env.example")


@pytest.mark.process
def test_each_service_owns_its_own_databases_alone(tmp_path):
    """MLflow's databases are new here; Optuna's is of an older version, in which the superuser owned its tables."""
    import psycopg
    from services import PASSWORD, postgres

    statements = yaml.safe_load(read("mlflow/compose.yaml"))["configs"]["databases"]["content"]
    (tmp_path / "databases.sql").write_text(statements)
    own = {"mlflow": "m'1", "mlflow_auth": "m'1", "optuna": "o\\2"}
    with postgres() as server:

        def run(user, password, database, statement):
            uri = server.replace("raysweep@", f"{user}@") + f"/{database}"
            with psycopg.connect(uri, password=password, autocommit=True) as connection:
                return connection.execute(statement)

        run("raysweep", PASSWORD, "postgres", "DROP DATABASE mlflow")
        run("raysweep", PASSWORD, "optuna", "CREATE TYPE direction AS ENUM ('up')")
        run("raysweep", PASSWORD, "optuna", "CREATE TABLE studies (d direction)")
        environment = os.environ | {
            "PGPASSWORD": PASSWORD,
            "MLFLOW_DB_PASSWORD": own["mlflow"],
            "OPTUNA_DB_PASSWORD": own["optuna"],
        }
        command = ["psql", "-X", "-v", "ON_ERROR_STOP=1", "-f", str(tmp_path / "databases.sql"), f"{server}/postgres"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        run("optuna", own["optuna"], "optuna", "ALTER TABLE studies ADD COLUMN n int")
        for database, password in own.items():
            user = database.partition("_")[0]
            run(user, password, database, "CREATE TABLE experiments (n int)")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                run(user, password, database, "CREATE ROLE another")
            for other in set(own) - {name for name in own if name.startswith(user)}:
                with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
                    run(user, password, other, "SELECT 1")


@pytest.mark.process
def test_the_mlflow_server_has_the_options_it_is_given():
    told = subprocess.run([BIN / "mlflow", "server", "--help"], capture_output=True, text=True, check=True).stdout
    command = yaml.safe_load(read("mlflow/compose.yaml"))["services"]["mlflow"]["command"][-1]
    options = re.findall(r"--[\w-]+", command)
    assert {"--backend-store-uri", "--artifacts-destination", "--allowed-hosts", "--app-name"} <= set(options)
    assert [option for option in options if option not in told] == []


# The local cluster


def local_cluster(state, *arguments):
    environment = os.environ | {"RAYSWEEP_LOCAL_CLUSTER": str(state)}
    command = [CLUSTER / "local" / "cluster", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def answer(address, token=None):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{address}/api/jobs/", headers=headers), timeout=10
        ) as found:
            return found.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def state():
    """A short path: Ray keeps sockets there."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="lc")) / "s"
    yield folder
    if folder.exists():
        local_cluster(folder, "stop")
    shutil.rmtree(folder.parent, ignore_errors=True)


@pytest.mark.ray
def test_the_local_cluster_starts_wants_its_token_and_stops(state):
    started = local_cluster(state, "start")
    assert started.returncode == 0, started.stdout + started.stderr
    assert "a head and 2 workers with 1 CPUs each are running" in started.stdout
    assert (state / "token").stat().st_mode & 0o777 == 0o600
    address, token = (state / "address").read_text().strip(), (state / "token").read_text().strip()
    assert [answer(address), answer(address, "another"), answer(address, token)] == [401, 403, 200]
    assert token not in started.stdout
    assert f"3 nodes at {address}" in local_cluster(state, "status").stdout
    again = local_cluster(state, "start")
    assert (again.returncode, again.stderr.strip()) == (
        1, f"error: {state}: a cluster is running, or one was not stopped: {CLUSTER}/local/cluster stop",
    )  # fmt: skip
    os.killpg(
        int((state / "worker-2.pid").read_text()), signal.SIGKILL
    )  # a node that died does not keep it from ending
    assert local_cluster(state, "stop").returncode == 0
    left = subprocess.run(["pgrep", "-fa", f"{state}/"], capture_output=True, text=True, check=False).stdout
    assert left == ""
    assert not state.exists()
    stopped = local_cluster(state, "stop")
    assert (stopped.returncode, stopped.stderr.strip()) == (1, f"error: no cluster is running ({state} is not there)")


@pytest.mark.process
def test_only_a_folder_that_start_made_is_removed(state):
    """RAYSWEEP_LOCAL_CLUSTER may name any folder, and a file in it any process."""
    state.mkdir()
    (state / "thesis.txt").write_text("text")
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        (state / "head.pid").write_text(f"{other.pid}\n")
        for mark in (None, ""):
            if mark is not None:
                (state / ".made-by-raysweep").write_text(mark)
            stopped = local_cluster(state, "stop")
            assert (stopped.returncode, stopped.stdout) == (1, "")
            assert str(state / ".made-by-raysweep") in stopped.stderr
            assert (state / "thesis.txt").exists()
            assert other.poll() is None
        other.kill()


@pytest.mark.process
def test_only_processes_of_the_cluster_are_ended(state):
    """Not those whose command names its folder, and not those whose id a file names."""
    state.mkdir()
    (state / ".made-by-raysweep").write_text("0123abcd\n")
    (state / "head.log").write_text("")
    own = os.environ | {"RAYSWEEP_LOCAL_CLUSTER_ID": "0123abcd"}
    another = os.environ | {"RAYSWEEP_LOCAL_CLUSTER_ID": "another"}
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    reader = subprocess.Popen(["tail", "-f", state / "head.log"], env=another, start_new_session=True)
    named = subprocess.Popen(["sleep", "60"], env=another, start_new_session=True)
    node = subprocess.Popen(["sleep", "60"], env=own, start_new_session=True)
    stubborn = subprocess.Popen([sys.executable, "-c", code], env=own, start_new_session=True, stdout=subprocess.PIPE)
    try:
        stubborn.stdout.readline()
        for name, process in {"worker-1": named, "head": node}.items():
            (state / f"{name}.pid").write_text(f"{process.pid}\n")
        assert local_cluster(state, "stop").stdout == "stopped\n"
        assert not state.exists()
        assert [reader.poll(), named.poll()] == [None, None]
        assert [node.wait(5), stubborn.wait(5)] == [-signal.SIGTERM, -signal.SIGKILL]
    finally:
        stubborn.stdout.close()
        for process in (reader, named, node, stubborn):
            process.kill()
            process.wait()


@pytest.mark.parametrize("arguments", [[], ["begin"], ["start", "--what", "1"]])
def test_the_local_cluster_says_how_it_is_used(state, arguments):
    done = local_cluster(state, *arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr
    assert not state.exists()
