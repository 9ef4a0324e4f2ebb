//! Pods that come, change and go while the agents run.

use std::fs;
use std::time::Duration;

use mesh_tests::{PodSpec, until};
use tokio::time::Instant;

use crate::common::{HTTP, WEB_V4, http_server, seen, wait_for, wait_until, web};

/// What the documentation promises for a change of the resources.
const ONE_SECOND: Duration = Duration::from_secs(1);

fn workload_state(web: &crate::common::Web, name: &str) -> Option<String> {
    let list = web.mesh.agents[0].get("/api/v1/workloads").unwrap();
    let found = list.as_array()?.iter().find(|item| item["name"] == name)?;
    found["state"].as_str().map(str::to_owned)
}

#[test]
fn a_pod_is_enrolled_and_released_within_a_second_and_others_do_not_notice() {
    let mut web = web();
    let url = format!("http://{WEB_V4}/");
    let late = web.mesh.stranger("late", 0).unwrap();
    let (report, enrolled, released) = std::thread::scope(|scope| {
        let args = [&*url, "--requests", "1500", "--rate", "500", "--connections", "4"];
        let client = &web.client;
        let load = scope.spawn(move || client.load(&args).unwrap());
        let started = Instant::now();
        web.mesh.announce(&late).unwrap();
        until("it to be enrolled", Duration::from_secs(5), || {
            (workload_state(&web, "late").as_deref() == Some("enrolled")).then_some(())
        })
        .unwrap();
        let enrolled = started.elapsed();
        assert_eq!(late.curl(&[&url]).unwrap().status, 200);
        let started = Instant::now();
        web.mesh.withdraw(&late).unwrap();
        until("it to be released", Duration::from_secs(5), || {
            workload_state(&web, "late").is_none().then_some(())
        })
        .unwrap();
        let released = started.elapsed();
        (load.join().unwrap(), enrolled, released)
    });
    assert!(enrolled < ONE_SECOND, "{enrolled:?}");
    assert!(released < ONE_SECOND, "{released:?}");
    assert_eq!(report["statuses"]["200"], 1500, "{report}");
    // It is an ordinary process again: there is nobody at a clusterIP, and pods are reached directly.
    assert!(late.curl(&["--connect-timeout", "1", &url]).is_err());
    assert_eq!(
        late.curl(&[&format!("http://{}/", web.server.at(HTTP))])
            .unwrap()
            .status,
        200
    );
}

#[test]
fn a_namespace_may_come_after_its_document_and_come_back_as_another() {
    let mut web = web();
    let mut pod = web.mesh.stranger("later", 0).unwrap();
    let url = format!("http://{WEB_V4}/");
    // Take the namespace away under the document, and put another in its place.
    let name = pod.netns.name().to_owned();
    web.mesh.announce(&pod).unwrap();
    until("it to be enrolled", Duration::from_secs(5), || {
        (workload_state(&web, "later").as_deref() == Some("enrolled")).then_some(())
    })
    .unwrap();
    web.mesh
        .replace_netns(&mut pod, || {
            until("it to be pending", Duration::from_secs(5), || {
                (workload_state(&web, "later").as_deref() == Some("pending")).then_some(())
            })
        })
        .unwrap();
    assert_eq!(pod.netns.name(), name);
    until("it to be enrolled again", Duration::from_secs(5), || {
        (workload_state(&web, "later").as_deref() == Some("enrolled")).then_some(())
    })
    .unwrap();
    assert_eq!(wait_for(&pod, &url).status, 200);
}

#[test]
fn endpoints_come_and_go_with_their_pods() {
    let mut web = web();
    let url = format!("http://{WEB_V4}/");
    let second = http_server(&mut web.mesh, PodSpec::new("web-2", 0).label("app", "web"));
    let response = wait_until(&web.client, &[&url], |response| {
        response.header("x-pod") == Some("web-2")
    });
    assert_eq!(seen(&response)["pod"], "web-2");
    web.mesh.withdraw(&second).unwrap();
    until("the endpoint to go", Duration::from_secs(5), || {
        let services = web.mesh.agents[0].get("/api/v1/services").ok()?;
        let service = services
            .as_array()?
            .iter()
            .find(|item| item["name"] == "web")?
            .to_string();
        (!service.contains("shop/web-2")).then_some(())
    })
    .unwrap();
    let report = web.client.load(&[&url, "--requests", "100"]).unwrap();
    assert_eq!(report["pods"], serde_json::json!({"web": 100}));
}

#[test]
fn a_bad_document_is_refused_alone_and_said_where() {
    let web = web();
    let bad = "apiVersion: v1\nkind: Service\nmetadata: {name: fine, namespace: shop}\n\
               spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}\n\
               ---\napiVersion: v1\nkind: Service\nmetadata: {name: bad, namespace: shop}\n\
               spec: {selector: {app: web}, ports: [{name: http, port: 70000}]}\n";
    web.mesh.apply("mixed", bad).unwrap();
    wait_for(&web.client, "http://fine/");
    let status = web.mesh.agents[0].get("/api/v1/status").unwrap();
    let finding = status["findings"]
        .as_array()
        .unwrap()
        .iter()
        .find(|finding| finding["severity"] == "error");
    let finding = finding.unwrap_or_else(|| panic!("{status}"));
    assert!(
        finding["file"].as_str().unwrap().ends_with("mixed.yaml"),
        "{finding}"
    );
    assert_eq!(finding["document"], 2, "{finding}");
    assert!(
        finding["path"].as_str().unwrap().contains("ports[0].port"),
        "{finding}"
    );

    let file = web.mesh.run.dir().join("resources/mixed.yaml");
    let mut validate = web.mesh.agents[0].command();
    let output = mesh_tests::shell::raw(validate.arg("validate").arg(&file)).unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    for part in ["mixed.yaml", "ports[0].port", "70000"] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn the_last_good_state_is_used_when_the_files_cannot_be_read() {
    let mut web = web();
    let resources = web.mesh.run.dir().join("resources");
    let away = web.mesh.run.dir().join("away");
    let state = web.mesh.run.dir().join("state/node-a/resources.jsonl");
    until(
        "all that the agent knows to be on its disk",
        Duration::from_secs(10),
        || {
            let saved = fs::read_to_string(&state).ok()?;
            // The last thing that was announced.
            saved.contains(web.client.netns.name()).then_some(())
        },
    )
    .unwrap();
    web.mesh.agents[0].kill();
    fs::rename(&resources, &away).unwrap();
    web.mesh.agents[0].start(&web.mesh.run).unwrap();
    wait_for(&web.client, &format!("http://{WEB_V4}/"));
    fs::rename(&away, &resources).unwrap();
    web.mesh
        .service("again", &["10.96.0.70"], &[("http", 80, HTTP)], "web")
        .unwrap();
    wait_for(&web.client, "http://10.96.0.70/");
}

#[test]
fn a_process_outside_the_mesh_is_left_alone() {
    let mut web = web();
    let one = web.mesh.stranger("one", 0).unwrap();
    let mut two = web.mesh.stranger("two", 1).unwrap();
    two.serve(&web.mesh.run, "http", HTTP).unwrap();
    let capture = web.mesh.capture("strangers").unwrap();
    let response = one.curl(&[&format!("http://{}/", two.at(HTTP))]).unwrap();
    assert_eq!(response.header("x-pod"), Some("two"));
    assert!(capture.stop().unwrap().contains(b"x-pod: two"));
}
