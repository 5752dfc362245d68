//! A run's beginning: the verdict, its egress, its tenant's folder, its cage.
//! It must never start anything that the verdict did not admit.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use gaoler_protocol::{
    CREDENTIAL_BYTES_MAX, Conversation, Kind, Message, OPTIONS_BYTES_MAX, Placeholder, REMOTES_BYTES_MAX,
    Refusal, Refused, Rules, Spawn, TenantKey, Tier, VOUCHING_MAX, WORKSPACE_DEFAULT,
};
use gaoler_sys::{memfd, mount, process};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use super::end::{end, fail};
use super::{Monitor, Stage};
use crate::admit::{self, Situation, Verdict};
use crate::boot::Mode;
use crate::cage::{self, Blueprint, Command, Places};
use crate::fault::{Doing, Fault};
use crate::plan::{Ids, Root};
use crate::run::{Broker, Phase, Run};
use crate::spawn::{self, Network};
use crate::tenants::{Closed, DEFAULT, Folder, Tenant, TenantId};
use crate::{invocation, namespaces};

/// Bytes of what comes beside a Spawn, at most: options, credential, remote MCP servers.
const SEALED_BYTES_MAX: [usize; 3] = [OPTIONS_BYTES_MAX, CREDENTIAL_BYTES_MAX, REMOTES_BYTES_MAX];

impl Monitor {
    pub(super) fn on_spawn(&mut self, mut spawn: Spawn, fds: Vec<OwnedFd>) {
        let sealed = |fd: &OwnedFd, max| memfd::is_sealed(fd, max);
        let tenant = (!spawn.ephemeral).then(|| TenantId::of(&spawn.tenant));
        // One that is late with its end may still have a process, and counts.
        let alone = self.plan.tier == Tier::Directory && !self.host.settings.isolation.tenants_together;
        let now = Situation {
            another: alone && self.runs.iter().any(|run| run.tenant != tenant),
            exec: self.host.mode == Mode::Exec,
            level_maximum: self.host.levels.maximum,
            runs: self.runs.iter().filter(|run| !run.quarantined).count(),
            runs_max: (self.host.settings.runs.max + VOUCHING_MAX) as usize,
            draining: matches!(self.stage, Stage::Draining(_)),
            proving: self.stage == Stage::Proving,
            known: self.runs.iter().any(|run| run.id() == spawn.run),
            sealed: spawn.kind.fds().contains(&fds.len())
                && fds.iter().zip(SEALED_BYTES_MAX).all(|(fd, most)| sealed(fd, most)),
        };
        let bounds = self.host.levels.get(spawn.level);
        let limits = match admit::admit(&spawn, now, |wish| bounds.clamp(wish)) {
            Verdict::Admit(limits) => limits,
            Verdict::Refuse(reason) => {
                let refused = Refused { run: spawn.run, reason, step: 0, errno: 0 };
                return self.say(&Message::Refused(refused), &[]);
            }
            Verdict::Hostile(why) => return self.hostile(why),
        };
        spawn.tenant = TenantKey([0; 32]);
        let Ok(secret) = process::random() else { return self.stop(1, "no_random_bytes") };
        let mut run = Run::new(spawn, tenant, limits, Placeholder(secret));
        let mut fds = fds.into_iter();
        (run.options, run.credential, run.remotes) = (fds.next(), fds.next(), fds.next());
        self.begin(&mut run);
        self.runs.push(run);
    }

    /// Starts egress where the run has one, and the cage unless the tenant is new.
    pub(super) fn begin(&mut self, run: &mut Run) {
        let known = match &run.tenant {
            None => Ok(true),
            Some(id) => self.tenants.find(id).map(|found| found.is_some()),
        };
        let known = match known {
            Ok(known) => known,
            Err(fault) => return fail(run, Refusal::CageFailed, &fault),
        };
        let kind = run.spawn.kind;
        if known && !kind.has_egress() {
            run.credential = None;
        }
        if run.credential.is_some()
            && let Err(fault) = self.start_egress(run)
        {
            return fail(run, Refusal::EgressFailed, &fault);
        }
        if !known && run.egress.is_none() && kind != Kind::Exec {
            run.refuse(Refusal::CredentialRefused, 0, 0);
            return end(run);
        }
        // Where nothing but the CLI's rules keeps tenants apart, nobody has commands, git's among them.
        if kind == Kind::Fetch && self.plan.rules == Rules::Directory {
            run.refuse(Refusal::LevelUnavailable, 0, 0);
            return end(run);
        }
        if known || run.egress.is_none() {
            return self.launch(run);
        }
        run.phase = Phase::Vouching;
        if let Err(fault) = self.serve(run, None) {
            fail(run, Refusal::EgressFailed, &fault);
        }
    }

    pub(super) fn start_egress(&mut self, run: &mut Run) -> Result<(), Fault> {
        let slot = self
            .egress_uids
            .take()
            .ok_or_else(|| Fault::new("take an egress uid", "the range is used up"))?;
        let uid = self.plan.own_uid(self.egress_uids.uid(&slot));
        let url = if run.spawn.proof { &self.host.proving_url } else { &self.host.upstream_url };
        let silence = self.host.settings.runs.silence_seconds.to_string();
        let ports = &self.host.levels.get(run.spawn.level).proxy_ports;
        let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
        let mut argv =
            vec!["gaoler-egress", "--upstream", url.as_str(), "--silence-seconds", silence.as_str()];
        if !ports.is_empty() {
            argv.extend(["--connect", ports.as_str()]);
        }
        let program =
            self.host.egress.as_ref().ok_or_else(|| Fault::new("start egress", "its program is missing"))?;
        let runs = &mut self.runs;
        let wipe = || Run::wipe_all(&mut run.placeholder, runs);
        let vault: Vec<BorrowedFd<'_>> = self.host.vault.iter().map(AsFd::as_fd).collect();
        let process = spawn::start(&self.plan, program.as_fd(), &argv, uid, Network::Host, &vault, wipe);
        match process {
            Ok(process) => {
                run.egress = Some(Broker {
                    process,
                    slot,
                    uid,
                    ready: false,
                    waiting: Vec::new(),
                    revoked: false,
                    heard: None,
                    said: 0,
                });
                Ok(())
            }
            Err(fault) => {
                self.egress_uids.release(slot);
                Err(fault)
            }
        }
    }

    /// Hands egress the credential: to be vouched for, or to be used for whoever comes to the cage's listeners.
    pub(super) fn serve(&self, run: &mut Run, listeners: Option<Vec<OwnedFd>>) -> Result<(), Fault> {
        let message = run.serve(listeners.is_none());
        let credential =
            run.credential.as_ref().ok_or_else(|| Fault::new("serve", "the credential is gone"))?;
        let mut fds = vec![
            credential.try_clone().doing("copy a credential's descriptor")?,
            self.host.resolver().doing("open resolv.conf")?,
        ];
        if let Some(listeners) = listeners {
            let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).doing("make a ledger")?;
            run.ledger = Some(read);
            let hosts = &self.host.levels.get(run.spawn.level).hosts;
            fds.extend([hosts.try_clone().doing("copy the hosts' descriptor")?, write]);
            let proxied = listeners.len() > 1;
            fds.extend(listeners);
            // They are reached by the proxy alone: without one they would be taken for its listener.
            fds.extend(run.remotes.take().filter(|_| proxied));
            run.credential = None;
        }
        let egress = run.egress.as_mut().ok_or_else(|| Fault::new("serve", "egress is gone"))?;
        match egress.tell(message, fds) {
            true => Ok(()),
            false => Err(Fault::new("serve", "egress does not listen")),
        }
    }

    pub(super) fn launch(&mut self, run: &mut Run) {
        run.phase = Phase::Launching;
        match self.make_cage(run) {
            Ok(()) => {}
            Err(Closed::Refused(refusal)) => {
                run.refuse(refusal, 0, 0);
                end(run);
            }
            Err(Closed::Fault(fault)) if fault.errno() == libc::EWOULDBLOCK as u16 => {
                run.refuse(Refusal::SessionBusy, 0, 0);
                end(run);
            }
            Err(Closed::Fault(fault)) => fail(run, Refusal::CageFailed, &fault),
        }
    }

    pub(super) fn make_cage(&mut self, run: &mut Run) -> Result<(), Closed> {
        let limits = run.limits;
        let level = self.host.levels.get(self.host.levels.default).limits;
        let (pool, source) = self.source(level);
        // The run's from here on: what fails below is given back by its teardown, and by nobody else.
        let set = run.set.insert(pool.take(source)?);
        set.bound(limits)?;
        run.uid = set.uid;
        let plan = self.plan;
        let (mut workspace, mut session, mut workspace_path, mut session_path) = (None, None, None, None);
        if let Some(id) = &run.tenant {
            let tenant: Tenant = self.tenants.admit(id)?;
            if plan.ids == Ids::Tenant {
                run.uid = tenant.uid;
                set.belongs_to(self.host.proc_fd.as_fd(), tenant.uid)?;
            }
            let name = invocation::uuid(&run.spawn.session);
            let path = match run.spawn.kind {
                Kind::Files | Kind::Fetch => "workspaces".to_owned(),
                Kind::Sessions => "sessions".to_owned(),
                Kind::Cli | Kind::Exec => {
                    let wish = match run.spawn.workspace {
                        unsaid if unsaid == [0; 16] => None,
                        WORKSPACE_DEFAULT => Some(DEFAULT.to_owned()),
                        uuid => Some(invocation::uuid(&uuid)),
                    };
                    let lasting = run.spawn.conversation == Conversation::Session;
                    let own = match lasting && run.spawn.kind == Kind::Cli {
                        true => tenant.workspace_of(&name, wish.as_deref())?,
                        false => wish.unwrap_or_else(|| DEFAULT.to_owned()),
                    };
                    run.workspace = Some(tenant.workspace(&own)?);
                    if lasting && run.spawn.kind == Kind::Cli {
                        run.session = Some(tenant.session(&name, &own)?);
                    }
                    format!("workspaces/{own}")
                }
            };
            if plan.root == Root::Own {
                let map = match plan.ids {
                    Ids::Run => Some(namespaces::user(self.host.proc_fd.as_fd(), tenant.uid, run.uid)?),
                    Ids::Tenant | Ids::Same => None,
                };
                let map = map.as_ref().map(AsFd::as_fd);
                workspace = Some(match &run.workspace {
                    Some(folder) => self.mounted(folder.as_fd(), map)?,
                    None => self.mounted(tenant.part(&path)?.as_fd(), map)?,
                });
                session = run.session.as_ref().map(|folder| self.mounted(folder.as_fd(), map)).transpose()?;
            } else {
                let tenants = self.host.state.join("tenants").join(&id.0);
                if run.workspace.is_none() {
                    tenant.part(&path)?;
                }
                workspace_path = Some(tenants.join(&path));
                session_path = run.session.as_ref().map(|_| tenants.join("sessions").join(&name));
            }
            run.folder_of_tenant = Some(tenant);
            (run.disk.begun, run.disk.begun_grown) = (self.free().0, self.grown);
        }
        let places = match (plan.root, &self.host.folders) {
            (Root::Own, _) => Places::own(),
            (Root::Covered, _) => Places::covered(workspace_path, &self.host.cli),
            (Root::Host, folders) => {
                let folders =
                    folders.as_ref().ok_or_else(|| Fault::new("make a cage", "there is no place"))?;
                let name = run.id().to_string();
                let path = self.host.state.join("runs").join(&name);
                let parts = ["home", "tmp", "run", "workspace"];
                run.folder = Some(Folder::make(folders, name, run.uid, &parts)?);
                Places::below(&path, workspace_path, &self.host.cli)
            }
        };
        // Where a cage sees other processes' entries, no secret is in an environment.
        let third = match run.spawn.kind {
            Kind::Cli if !plan.has_own_proc() => {
                let text = run.placeholder.token();
                Some(memfd::sealed("token", text.as_bytes()).doing("seal a placeholder")?)
            }
            Kind::Cli | Kind::Exec => None,
            Kind::Files | Kind::Sessions | Kind::Fetch => {
                let program = self.host.files.as_ref().map(OwnedFd::try_clone).transpose();
                let program = program.doing("copy a program's descriptor")?;
                Some(program.ok_or_else(|| Fault::new("make a cage", "its program is missing"))?)
            }
        };
        run.third = third.is_some();
        run.peer = if plan.root == Root::Host && plan.peers { run.uid } else { 0 };
        run.family = !plan.has_pids();
        let ahead =
            run.set.as_ref().and_then(|set| set.ahead.as_ref()).map(
                |[user, network]| -> std::io::Result<_> { Ok([user.try_clone()?, network.try_clone()?]) },
            );
        let ahead = ahead.transpose().doing("copy a namespace's descriptor")?;
        let command = match run.spawn.kind {
            Kind::Cli => {
                let policy = self.host.levels.get(run.spawn.level).policy;
                Command::Cli(invocation::of(&run.spawn, &run.placeholder, run.third, plan.rules, policy))
            }
            Kind::Exec => Command::Exec,
            Kind::Files | Kind::Sessions | Kind::Fetch => Command::Files(run.placeholder.token()),
        };
        let blueprint = Blueprint {
            uid: run.uid,
            ahead,
            places,
            workspace,
            session,
            session_path,
            proxy: !self.host.levels.get(run.spawn.level).proxy_ports.is_empty(),
            third,
            egress: run.spawn.kind.has_egress(),
            options: run.options.take().ok_or_else(|| Fault::new("make a cage", "the options are gone"))?,
            command,
            limits,
        };
        let runs = &mut self.runs;
        let placeholder = &mut run.placeholder;
        let leaf = run.set.as_ref().and_then(|set| set.leaf.as_ref());
        let common = self.commons.get(run.spawn.level as usize - 1);
        let common = common.ok_or_else(|| Fault::new("make a cage", "its level is not there"))?;
        let begun = cage::begin(common, &blueprint, leaf, || Run::wipe_all(placeholder, runs))?;
        let cage::Begun { init, line, gate, stdin, stdout, stderr } = begun;
        run.init = Some(init);
        run.line = Some(line);
        run.gate = Some(gate);
        run.stdio = Some([stdin, stdout, stderr]);
        Ok(())
    }

    /// A folder of the state as a detached mount; with a map its owner is, inside, the run's uid.
    fn mounted(&self, folder: BorrowedFd<'_>, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Fault> {
        let views =
            self.host.views.as_ref().ok_or_else(|| Fault::new("mount a folder", "there is no view"))?;
        let tree = views.copy(folder)?;
        let attributes = mount::Attributes { nosuid: true, nodev: true, idmap, read_only: false };
        mount::restrict(tree.as_fd(), attributes, false).doing("map the ids of a tenant's mount")?;
        Ok(tree)
    }
}
