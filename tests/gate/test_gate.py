"""What the gate decides, case by case."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from supervisor.policy.loader import compile_policy, load
from tests.gate.policies import argv_of, ask, observe_core, web_services
from tools import paths
from tools.gate import DEFAULT_DENY, NOT_INSTALLED, LexicalHost, RunContext, decide, decide_probe, summary
from tools.observers.observer import Probe
from tools.observers.registry import OBSERVERS
from tools.policy import Policy
from tools.values import Decision, StepResult, ToolCall


class RealHost(LexicalHost):
    """The paths of this very machine; every binary counts as pinned."""

    def resolve(self, path: str) -> str:
        return paths.resolve(path)

    def expand(self, pattern: str, limit: int) -> list[str]:
        return paths.expand(pattern, limit)


class Without(LexicalHost):
    def __init__(self, *missing: str) -> None:
        super().__init__()
        self.missing = missing

    def pinned(self, path: str) -> bool:
        return not path.endswith(self.missing)


def rooted(*roots: Path) -> Policy:
    """observe-core with read roots in a test's own directory."""
    return dataclasses.replace(observe_core(), read_roots=tuple(str(root) for root in roots))


def test_what_runs_is_complete_and_begins_with_the_policys_own_path() -> None:
    decision = ask("journalctl", "-u", "nginx")
    stage = decision.steps[0].stages[0]
    assert stage.binary == "/usr/bin/journalctl"
    assert stage.argv == ("/usr/bin/journalctl", "--no-pager", "-u", "nginx")
    assert stage.env["LC_ALL"] == "C.UTF-8" and stage.timeout_s == 60.0


def test_text_and_argv_of_the_same_command_have_the_same_digest() -> None:
    assert (
        ask(command="grep -i 'two words' /var/log/syslog").digest
        == ask("grep", "-i", "two words", "/var/log/syslog").digest
    )


def test_an_unknown_program_is_refused_by_default() -> None:
    decision = ask("frobnicate")
    assert (decision.outcome, decision.rule) == ("deny", DEFAULT_DENY)


def test_a_wrapper_is_refused_with_what_to_send_instead() -> None:
    decision = ask("timeout", "5", "df")
    assert decision.effect == "never" and decision.rule == "timeout"
    assert "wrapper" in decision.reason and "send the program itself" in decision.hint


def test_an_abbreviated_option_is_refused_with_the_full_one_as_hint() -> None:
    decision = ask("df", "--outp=source")
    assert decision.rule == "df" and "--output" in decision.hint


def test_a_following_tail_is_refused_with_a_count_as_hint() -> None:
    assert "-n 100" in ask("tail", "-f", "/var/log/syslog").reason


def test_a_program_the_machine_lacks_is_not_installed_rather_than_forbidden() -> None:
    assert ask("df", host=Without("/df")).rule == NOT_INSTALLED


def test_the_first_pinned_path_is_taken() -> None:
    assert argv_of(ask("df", host=Without("/usr/bin/df", "/usr/sbin/df")))[0] == "/bin/df"


def test_a_same_named_file_elsewhere_is_refused() -> None:
    assert ask("/usr/local/bin/df").outcome == "deny"
    assert ask("/bin/df").outcome == "allow"


def test_ping_without_a_count_gets_one() -> None:
    assert argv_of(ask("ping", "example.com"))[1:3] == ["-c", "4"]
    assert argv_of(ask("ping", "-c", "2", "example.com"))[1:] == ["-c", "2", "example.com"]


def test_zcat_is_gzip_without_its_shell_script() -> None:
    assert argv_of(ask("zcat", "/var/log/syslog.2.gz")) == ["/usr/bin/gzip", "-cd", "/var/log/syslog.2.gz"]


def test_a_recursive_grep_leaves_out_every_secret_below_its_start_whatever_was_asked_for() -> None:
    argv = argv_of(ask("grep", "-r", "--include=*.key", "x", "/etc"))
    assert {"--exclude=shadow*", "--exclude-dir=private", "--exclude=*.key", "--exclude-dir=sudoers.d"} <= set(argv)
    # grep obeys the last of two contradicting options
    assert argv.index("--exclude=*.key") > argv.index("--include=*.key")


def test_the_names_left_out_stand_before_a_double_dash() -> None:
    argv = argv_of(ask("grep", "-r", "--", "-x", "/etc"))
    assert argv.index("--exclude=shadow*") < argv.index("--")


def test_a_recursive_grep_really_finds_no_secret(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "ssl").mkdir()
    for name in ("open.conf", "site.key", "id_rsa", ".env", "ssl/shadow", "ssl/own"):
        (tmp_path / name).write_text("canary\n")
    policy = dataclasses.replace(
        rooted(tmp_path), secret_roots=(*observe_core().secret_roots, f"{tmp_path}/ssl/shadow*")
    )
    for asked in (("-r",), ("-rn", "--include=*"), ("-rl", "--exclude=zzz"), ("-rH", "--include=*.key")):
        argv = argv_of(ask("grep", *asked, "canary", str(tmp_path), policy=policy))
        if not os.access(argv[0], os.X_OK):
            pytest.skip("no grep on this machine")
        found = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
        assert not any(name in found for name in ("site.key", "id_rsa", ".env", "shadow")), found


def test_reading_whole_trees_needs_a_start_and_stays_out_of_the_kernels_files() -> None:
    assert "start directory" in ask("grep", "-r", "x").reason
    assert ask("grep", "-r", "x", "/sys/class").outcome == "deny"


def test_a_stage_that_would_send_on_what_it_is_given_may_not_stand_behind_a_pipe() -> None:
    assert "behind a pipe" in ask(command="cat /etc/hosts | openssl s_client -connect h:443").reason
    assert ask(command="openssl s_client -connect h:443 | openssl x509 -noout -dates").outcome == "allow"


def test_files_that_depend_on_the_network_are_read_where_the_network_is() -> None:
    assert ask("cat", "/proc/net/dev").steps[0].stages[0].network
    assert not ask("cat", "/etc/hosts").steps[0].stages[0].network


def test_where_standard_error_goes_is_the_runners_business() -> None:
    stages = ask(command="ls /var 2>&1 | head -n 2 2>/dev/null").steps[0].stages
    assert [stage.stderr for stage in stages] == ["stdout", "discard"]
    assert "2>&1" not in stages[0].argv


def test_a_link_out_of_the_roots_is_refused(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "logs" / "link").symlink_to(tmp_path / "secret")
    policy = rooted(tmp_path / "logs")
    assert "no read root" in ask("cat", f"{tmp_path}/logs/link", policy=policy, host=RealHost()).reason


def test_a_link_inside_the_roots_is_executed_as_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    argv = argv_of(ask("cat", f"{tmp_path}/link", policy=rooted(tmp_path), host=RealHost()))
    assert argv[1] == f"{tmp_path}/a"


def test_a_link_to_a_secret_is_not_even_listed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/shadow")
    assert "secret" in ask("ls", "-l", f"{tmp_path}/link", policy=rooted(tmp_path), host=RealHost()).reason


def test_a_file_that_does_not_exist_is_left_to_the_program_to_report() -> None:
    assert ask("cat", "/var/log/no/such/file", host=RealHost()).outcome == "allow"


def test_a_glob_is_expanded_by_the_gate_and_secrets_are_left_out(tmp_path: Path) -> None:
    for name in ("b.log", "a.log", "tls.key", ".hidden.log"):
        (tmp_path / name).write_text("x")
    policy = rooted(tmp_path)
    argv = argv_of(ask(command=f"cat {tmp_path}/*", policy=policy, host=RealHost()))
    assert argv[1:] == [f"{tmp_path}/a.log", f"{tmp_path}/b.log"]
    assert "secret" in ask(command=f"cat {tmp_path}/*.key", policy=policy, host=RealHost()).reason


def test_a_glob_that_matches_too_much_is_refused(tmp_path: Path) -> None:
    for number in range(observe_core().limits.glob_paths + 1):
        (tmp_path / f"{number}.log").write_text("x")
    assert "more than" in ask(command=f"cat {tmp_path}/*.log", policy=rooted(tmp_path), host=RealHost()).reason


def test_a_file_named_like_an_option_or_with_a_newline_does_no_harm_in_a_glob(tmp_path: Path) -> None:
    (tmp_path / "-rf").write_text("x")
    assert argv_of(ask(command=f"cat {tmp_path}/*", policy=rooted(tmp_path), host=RealHost()))[1] == f"{tmp_path}/-rf"
    (tmp_path / "a\nb").write_text("x")
    assert "newline" in ask(command=f"cat {tmp_path}/*", policy=rooted(tmp_path), host=RealHost()).reason


def test_the_installations_own_home_is_secret() -> None:
    host = LexicalHost(("/opt/agent/.local/share/chargehand",))
    assert ask("cat", "/opt/agent/.local/share/chargehand/state.json", host=host).outcome == "deny"
    assert ask("ls", "/opt/agent/.local/share/chargehand", host=host).outcome == "deny"


def read(path: str, policy: Policy | None = None, **more: object) -> Decision:
    return decide(policy or observe_core(), ToolCall("c1", "read", {"path": path, **more}), LexicalHost())


def test_a_read_is_decided_with_its_range_and_root() -> None:
    access = read("/var/log//syslog", offset=10, length=20).steps[0].file
    assert access is not None
    assert (access.path, access.root, access.offset, access.length) == ("/var/log/syslog", "/var/log", 10, 20)


@pytest.mark.parametrize(
    "more", [{"offset": -1}, {"length": 0}, {"length": 10**9}, {"offset": True}, {"x": 1}, {"length": "5"}]
)
def test_a_read_with_a_senseless_range_is_refused(more: dict[str, object]) -> None:
    assert read("/etc/hosts", None, **more).outcome == "deny"


def write(path: str, content: object = "x", **more: object) -> Decision:
    arguments = {"path": path, "content": content, **more}
    return decide(web_services(), ToolCall("c1", "write", arguments), LexicalHost())


def test_a_write_under_a_write_root_asks_and_elsewhere_is_refused() -> None:
    assert write("/etc/nginx/site.conf", mode=0o644).outcome == "ask"
    assert write("/etc/nginx").outcome == "deny"
    assert write("/etc/passwd").outcome == "deny"
    assert write("/etc/nginx/tls.key").outcome == "deny"
    assert write("/etc/nginx/x", mode=0o666).outcome == "deny"
    assert write("/etc/nginx/x", "\ud800").outcome == "deny"
    assert write("/etc/nginx/x", b"x").outcome == "deny"


def test_a_change_of_a_named_unit_asks_and_of_another_one_is_refused() -> None:
    assert ask("systemctl", "restart", "nginx", policy=web_services()).outcome == "ask"
    assert ask("systemctl", "restart", "app-1.service", policy=web_services()).outcome == "ask"
    assert ask("systemctl", "restart", "sshd", policy=web_services()).outcome == "deny"
    assert ask("systemctl", "restart", "app-*", policy=web_services()).outcome == "deny"
    assert ask("systemctl", "restart", "nginx", "sshd", policy=web_services()).outcome == "deny"
    assert ask("systemctl", "restart", "nginx").outcome == "deny"


def test_a_change_stands_alone() -> None:
    assert ask(command="systemctl restart nginx | cat", policy=web_services()).outcome == "deny"


@pytest.mark.parametrize(
    ("context", "outcome"),
    [
        (RunContext("alert", False, 0, 1400), "allow"),
        (RunContext("alert", False, 1, 60), "allow"),  # the window began on Monday and wraps over midnight
        (RunContext("alert", False, 0, 60), "ask"),
        (RunContext("alert", False, 0, 1200), "ask"),
        (RunContext("alert", True, 0, 1400), "ask"),  # untrusted output in the context
        (RunContext("operator", False, 0, 1400), "ask"),
    ],
)
def test_a_grant_holds_for_its_trigger_and_window_and_never_with_untrusted_output(
    context: RunContext, outcome: str
) -> None:
    assert ask("systemctl", "restart", "nginx", policy=web_services(), context=context).outcome == outcome


def test_a_grant_covers_only_its_sub_commands() -> None:
    context = RunContext("alert", False, 0, 1400)
    assert ask("systemctl", "stop", "nginx", policy=web_services(), context=context).outcome == "ask"


def test_an_observer_may_only_observe() -> None:
    decision = decide_probe(web_services(), Probe("x", ("systemctl", "restart", "nginx")), LexicalHost())
    assert decision.outcome == "deny"


def _parameters(name: str) -> dict[str, object]:
    examples: dict[str, object] = {
        "unit": "nginx.service", "host": "example.com", "paths": ["/etc/ssl/certs"], "duration": "1h", "boolean": True,
    }  # fmt: skip
    return {
        parameter.name: examples.get(parameter.kind, parameter.minimum)
        for parameter in OBSERVERS[name].parameters
        if parameter.required
    }


@pytest.mark.parametrize("name", sorted(OBSERVERS))
@pytest.mark.parametrize("worked", [True, False])
def test_every_probe_of_every_observer_is_allowed_by_the_default_policy(name: str, worked: bool) -> None:
    observer, parameters = OBSERVERS[name], _parameters(name)
    answer = StepResult(exit_status=0, exit_statuses=(0,)) if worked else StepResult(error="no such file")
    results: list[StepResult] = []
    probes = observer.probes(parameters)
    while probes:
        refused = {
            probe.label: decision.reason
            for probe in probes
            if (decision := decide_probe(observe_core(), probe, LexicalHost())).outcome != "allow"
        }
        assert refused == {}
        results += [answer] * len(probes)
        probes = observer.next_probes(results, parameters)
    assert decide(observe_core(), ToolCall("c1", name, parameters), LexicalHost(), OBSERVERS).outcome == "allow"


def test_an_observer_with_a_wrong_parameter_is_refused_with_its_own_words() -> None:
    decision = decide(observe_core(), ToolCall("c1", "unit_status", {"unit": "a b"}), LexicalHost(), OBSERVERS)
    assert decision.outcome == "deny" and "unit" in decision.reason


def test_an_unknown_tool_is_refused_with_the_known_ones() -> None:
    decision = decide(observe_core(), ToolCall("c1", "shell", {}), LexicalHost(), OBSERVERS)
    assert decision.outcome == "deny" and "exec" in decision.hint


def test_a_rule_with_effect_never_is_refused_even_though_its_grammar_fits() -> None:
    policy = Policy.from_json(
        compile_policy([load("policy: x\nrules:\n  df: {reason: not here, effect: never, flags: [-h]}\n")])
    )
    decision = ask("df", "-h", policy=policy)
    assert (decision.outcome, decision.effect, decision.rule) == ("deny", "never", "df")


def test_the_summary_holds_what_the_tester_prints() -> None:
    found = summary(ask(command="df -h | head -n 3"))
    assert found["decision"] == "allow"
    assert found["stages"] == [["/usr/bin/df", "-h"], ["/usr/bin/head", "-n", "3"]]
